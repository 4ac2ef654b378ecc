import { describe, expect, test } from "vitest";
import { History } from "../../src/history";

class Memory {
  readonly kept = new Map<string, unknown>();
  get(key: string): unknown {
    return this.kept.get(key);
  }
  update(key: string, value: unknown): Promise<void> {
    this.kept.set(key, value);
    return Promise.resolve();
  }
}

describe("what the input box remembers", () => {
  test("the latest first, each once, without blanks around it", async () => {
    const history = new History(new Memory(), () => 50);
    for (const request of ["add types", " simplify ", "", "   ", "add types"]) {
      await history.add(request);
    }
    expect(history.entries()).toEqual(["add types", "simplify"]);
  });

  test("as many as the setting says, also when it is made smaller", async () => {
    let size = 3;
    const history = new History(new Memory(), () => size);
    for (const request of ["a", "b", "c", "d"]) {
      await history.add(request);
    }
    expect(history.entries()).toEqual(["d", "c", "b"]);
    size = 1;
    expect(history.entries()).toEqual(["d"]);
    size = 0;
    await history.add("e");
    expect(history.entries()).toEqual([]);
  });

  test("no pasted file", async () => {
    const history = new History(new Memory(), () => 50);
    await history.add("x".repeat(2001));
    expect(history.entries()).toEqual([]);
  });

  test("nothing after it was cleared, and nothing from a store that another wrote", async () => {
    const memory = new Memory();
    const history = new History(memory, () => 50);
    await history.add("a");
    await history.clear();
    expect(history.entries()).toEqual([]);
    memory.kept.set("planpatch.requests", { not: "a list" });
    expect(history.entries()).toEqual([]);
    memory.kept.set("planpatch.requests", ["a", 7, null]);
    expect(history.entries()).toEqual(["a"]);
  });
});
