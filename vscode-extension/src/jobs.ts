// The server's jobs as the client hears of them. A job may end before the answer that names it has come.

import type { Job } from "./protocol";

const MOST_ENDED = 32;

export function hasEnded(job: Job): boolean {
  return job.state !== "waiting" && job.state !== "loading" && job.state !== "running";
}

export class ServerGone extends Error {}

export class Jobs {
  private readonly known = new Map<string, Job>();
  private readonly waiting = new Map<string, { resolve(job: Job): void; reject(error: Error): void }[]>();
  private readonly listeners = new Set<(job: Job) => void>();

  /** Call with every job that changes; returns how to stop that. */
  listen(listener: (job: Job) => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  update(job: Job): void {
    const before = this.known.get(job.jobId);
    if (before !== undefined && hasEnded(before)) {
      return; // a late report of tokens
    }
    this.known.set(job.jobId, job);
    for (const listener of this.listeners) {
      listener(job);
    }
    if (hasEnded(job)) {
      const askers = this.waiting.get(job.jobId) ?? [];
      this.waiting.delete(job.jobId);
      askers.forEach((asker) => asker.resolve(job));
      this.drop();
    }
  }

  /** The job once it has ended, however it ends. */
  end(jobId: string): Promise<Job> {
    const job = this.known.get(jobId);
    if (job !== undefined && hasEnded(job)) {
      return Promise.resolve(job);
    }
    return new Promise((resolve, reject) => {
      this.waiting.set(jobId, [...(this.waiting.get(jobId) ?? []), { resolve, reject }]);
    });
  }

  /** Jobs that have not ended, oldest first. */
  running(): Job[] {
    return [...this.known.values()].filter((job) => !hasEnded(job));
  }

  /** The server is gone, and its jobs with it. */
  forgetAll(): void {
    const gone = this.running();
    const askers = [...this.waiting.values()].flat();
    this.known.clear();
    this.waiting.clear();
    askers.forEach((asker) => asker.reject(new ServerGone("The server ended")));
    for (const job of gone) {
      for (const listener of this.listeners) {
        listener({ ...job, state: "cancelled" });
      }
    }
  }

  private drop(): void {
    const ended = [...this.known.values()].filter(hasEnded);
    for (const job of ended.slice(0, Math.max(0, ended.length - MOST_ENDED))) {
      this.known.delete(job.jobId);
    }
  }
}
