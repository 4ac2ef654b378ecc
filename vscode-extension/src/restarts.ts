// Restarts, coalesced: however many are asked for while one is under way, one more follows. And when to stop trying.

export class Restarts {
  private running: Promise<void> | null = null;
  private next: Promise<void> | null = null;

  /**
   * @param work Starts the server anew; its error goes to those who asked for that very start.
   * @param quietMs How long after the first request others are waited for: settings change in bursts.
   */
  constructor(
    private readonly work: () => Promise<void>,
    private readonly quietMs = 0,
  ) {}

  /** Whether a restart is under way or about to be. */
  get isBusy(): boolean {
    return this.running !== null || this.next !== null;
  }

  /** The start that is under way or about to be; null for none. Its error goes to whoever waits for it, too. */
  get underWay(): Promise<void> | null {
    return this.next ?? this.running;
  }

  /** Ask for a restart that begins after now; resolves when it is done. */
  request(): Promise<void> {
    this.next ??= this.follow(this.running);
    return this.next;
  }

  private async follow(before: Promise<void> | null): Promise<void> {
    await before?.catch(() => undefined); // its error was its askers' to see
    await new Promise((resolve) => setTimeout(resolve, this.quietMs));
    const now = this.next;
    this.running = now;
    this.next = null;
    try {
      await this.work();
    } finally {
      if (this.running === now) {
        this.running = null;
      }
    }
  }
}

/** Says when a server that ends by itself is not started again. */
export class Crashes {
  private times: number[] = [];

  constructor(
    private readonly most = 3,
    private readonly withinMs = 3 * 60_000,
    private readonly now: () => number = Date.now,
  ) {}

  /** Note a crash; true if the server should be started again. */
  record(): boolean {
    const at = this.now();
    this.times = [...this.times.filter((time) => at - time < this.withinMs), at];
    return this.times.length < this.most;
  }

  /** The user started it on purpose: count anew. */
  forget(): void {
    this.times = [];
  }
}
