import { describe, expect, test } from "vitest";
import { Jobs, ServerGone } from "../../src/jobs";
import type { Job, JobState } from "../../src/protocol";

function job(state: JobState, jobId = "j1", more: Partial<Job> = {}): Job {
  return { jobId, kind: "patch", title: "t", uri: "", function: "", state, stage: "", numTokens: 0, ...more };
}

describe("a job's end", () => {
  test("is told to everybody who waits for it, however it ends", async () => {
    for (const state of ["done", "refused", "failed", "cancelled"] as const) {
      const jobs = new Jobs();
      const waiting = [jobs.end("j1"), jobs.end("j1")];
      jobs.update(job("running"));
      jobs.update(job(state));
      expect((await Promise.all(waiting)).map((one) => one.state)).toEqual([state, state]);
    }
  });

  test("may come before the answer that names the job", async () => {
    const jobs = new Jobs();
    jobs.update(job("done", "j1", { ok: true }));
    expect((await jobs.end("j1")).ok).toBe(true);
  });

  test("is not undone by a late report of tokens", () => {
    const jobs = new Jobs();
    jobs.update(job("done"));
    jobs.update(job("running", "j1", { text: "late" }));
    expect(jobs.running()).toEqual([]);
  });

  test("comes for all when the server is gone", async () => {
    const jobs = new Jobs();
    const heard: JobState[] = [];
    jobs.listen((one) => heard.push(one.state));
    jobs.update(job("running"));
    const [known, unknown] = [jobs.end("j1"), jobs.end("j2")];
    jobs.forgetAll();
    await expect(known).rejects.toThrow(ServerGone);
    await expect(unknown).rejects.toThrow(ServerGone);
    expect(heard).toEqual(["running", "cancelled"]);
    expect(jobs.running()).toEqual([]);
  });
});

test("running jobs are listed oldest first, each once", () => {
  const jobs = new Jobs();
  for (const [id, state] of [["j1", "waiting"], ["j2", "waiting"], ["j1", "running"], ["j3", "done"]] as const) {
    jobs.update(job(state, id));
  }
  expect(jobs.running().map((one) => [one.jobId, one.state])).toEqual([
    ["j1", "running"],
    ["j2", "waiting"],
  ]);
});

test("who stops listening hears no more", () => {
  const jobs = new Jobs();
  let heard = 0;
  const stop = jobs.listen(() => (heard += 1));
  jobs.update(job("waiting"));
  stop();
  jobs.update(job("running"));
  expect(heard).toBe(1);
});

test("of many that ended the last are remembered, and none that runs is forgotten", async () => {
  const jobs = new Jobs();
  jobs.update(job("running", "still"));
  for (let number = 0; number < 100; number++) {
    jobs.update(job("done", `j${number}`));
  }
  expect(jobs.running().map((one) => one.jobId)).toEqual(["still"]);
  expect((await jobs.end("j99")).state).toBe("done");
});
