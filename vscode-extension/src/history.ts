// What the input box remembers: the user's requests, latest first, each once.

export interface Store {
  get(key: string): unknown;
  update(key: string, value: unknown): Thenable<void>;
}

const KEY = "planpatch.requests";
const LONGEST = 2000; // a pasted file is no request worth keeping

export class History {
  constructor(
    private readonly store: Store,
    private readonly size: () => number,
  ) {}

  entries(): string[] {
    const found = this.store.get(KEY);
    const texts = Array.isArray(found) ? found.filter((one): one is string => typeof one === "string") : [];
    return texts.slice(0, this.size());
  }

  async add(request: string): Promise<void> {
    const text = request.trim();
    if (text === "" || text.length > LONGEST) {
      return;
    }
    const others = this.entries().filter((one) => one !== text);
    await this.store.update(KEY, [text, ...others].slice(0, this.size()));
  }

  async clear(): Promise<void> {
    await this.store.update(KEY, undefined);
  }
}
