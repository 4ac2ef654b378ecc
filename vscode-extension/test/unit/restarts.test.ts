import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { Crashes, Restarts } from "../../src/restarts";

beforeEach(() => void vi.useFakeTimers());
afterEach(() => void vi.useRealTimers());

/** Work that ends when the test says so. */
class Work {
  started = 0;
  private ends: (() => void)[] = [];
  private fails: ((error: Error) => void)[] = [];

  readonly run = (): Promise<void> => {
    this.started += 1;
    return new Promise((resolve, reject) => {
      this.ends.push(resolve);
      this.fails.push(reject);
    });
  };

  async end(): Promise<void> {
    this.fails.shift();
    this.ends.shift()?.();
    await vi.advanceTimersByTimeAsync(0);
  }

  async fail(message: string): Promise<void> {
    this.ends.shift();
    this.fails.shift()?.(new Error(message));
    await vi.advanceTimersByTimeAsync(0);
  }
}

describe("restarts", () => {
  test("a burst of requests is one restart", async () => {
    const work = new Work();
    const restarts = new Restarts(work.run, 300);
    const asked = [restarts.request(), restarts.request()];
    await vi.advanceTimersByTimeAsync(299);
    asked.push(restarts.request());
    expect(work.started).toBe(0);
    await vi.advanceTimersByTimeAsync(1);
    expect(work.started).toBe(1);
    await work.end();
    await Promise.all(asked);
    expect(restarts.isBusy).toBe(false);
    expect(work.started).toBe(1);
  });

  test("however many are asked for while one is under way, one more follows, after it", async () => {
    const work = new Work();
    const restarts = new Restarts(work.run);
    const first = restarts.request();
    await vi.advanceTimersByTimeAsync(0);
    const later = [restarts.request(), restarts.request(), restarts.request()];
    await vi.advanceTimersByTimeAsync(1000);
    expect(work.started).toBe(1);
    await work.end();
    await first;
    await vi.advanceTimersByTimeAsync(0);
    expect(work.started).toBe(2);
    await work.end();
    await Promise.all(later);
    expect(work.started).toBe(2);
  });

  test("who asks while one is under way waits for one that began afterwards", async () => {
    const work = new Work();
    const restarts = new Restarts(work.run);
    void restarts.request();
    await vi.advanceTimersByTimeAsync(0);
    let isDone = false;
    void restarts.request().then(() => (isDone = true));
    await work.end();
    expect(isDone).toBe(false);
    await vi.advanceTimersByTimeAsync(0);
    await work.end();
    expect(isDone).toBe(true);
  });

  test("an error is told to those who asked for that very start, and the next one goes on", async () => {
    const work = new Work();
    const restarts = new Restarts(work.run);
    const first = expect(restarts.request()).rejects.toThrow("no Python");
    await vi.advanceTimersByTimeAsync(0);
    const second = restarts.request();
    await work.fail("no Python");
    await first;
    await vi.advanceTimersByTimeAsync(0);
    await work.end();
    await expect(second).resolves.toBeUndefined();
    expect(restarts.isBusy).toBe(false);
  });
});

describe("crashes", () => {
  test("the third within three minutes is the last", () => {
    let now = 0;
    const crashes = new Crashes(3, 180_000, () => now);
    expect(crashes.record()).toBe(true);
    now = 60_000;
    expect(crashes.record()).toBe(true);
    now = 179_999;
    expect(crashes.record()).toBe(false);
  });

  test("crashes that are far apart are each made up for", () => {
    let now = 0;
    const crashes = new Crashes(3, 180_000, () => now);
    for (let count = 0; count < 10; count++) {
      expect(crashes.record()).toBe(true);
      now += 100_000;
    }
  });

  test("a restart by the user counts anew", () => {
    const crashes = new Crashes(3, 180_000, () => 0);
    crashes.record();
    crashes.record();
    crashes.forget();
    expect(crashes.record()).toBe(true);
  });
});
