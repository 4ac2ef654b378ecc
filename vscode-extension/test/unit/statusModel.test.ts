import { describe, expect, test } from "vitest";
import type { Job, Status } from "../../src/protocol";
import { bar, bytes, cancellable, evaluationWords, jobWords, rows, type Translate } from "../../src/statusModel";

const t: Translate = (message, ...args) => message.replace(/\{(\d)\}/g, (_, index: string) => String(args[Number(index)]));

const READY: Status = {
  state: "ready",
  model: "qwen3-8b",
  message: "",
  hint: "",
  device: "cuda:0",
  quantization: "int8",
  adapter: "/home/me/training/qlora-out/style-v3/",
  memoryBytes: 9_600_000_000,
  contextLength: 32768,
  jobs: [],
  pending: ["p_1"],
  last: { plan: { totalS: 0.34, numTokens: 16 }, patch: { totalS: 2.05, numTokens: 120 } },
  version: "0.1.0",
  http: "http://127.0.0.1:8765",
};

function job(more: Partial<Job>): Job {
  return { jobId: "j1", kind: "plan", title: "plan for f", uri: "", function: "f", state: "running", stage: "", numTokens: 0, ...more };
}

describe("the status bar", () => {
  test.each<[string, Parameters<typeof bar>[0], Status | null, Job[], string, string]>([
    ["before anything", "off", null, [], "$(sparkle) PlanPatch", "none"],
    ["starting", "starting", null, [], "$(loading~spin) PlanPatch: starting", "none"],
    ["failed", "failed", null, [], "$(error) PlanPatch: not running", "error"],
    ["ready, with an adapter", "running", READY, [], "$(sparkle) qwen3-8b + style-v3", "none"],
    ["ready, without", "running", { ...READY, adapter: null }, [], "$(sparkle) qwen3-8b", "none"],
    ["a download", "running", { ...READY, state: "loading", message: "piece 3 of 9 (31%)" }, [], "$(loading~spin) piece 3 of 9 (31%)", "none"],
    ["training", "running", { ...READY, training: { run: "style-v4", step: 7, numSteps: 40, leftS: 95 } }, [], "$(mortar-board) training style-v4: step 7 of 40, 2 min left", "none"],
    ["training that begins", "running", { ...READY, training: { run: "style-v4", step: 0, numSteps: 0, leftS: null } }, [], "$(mortar-board) training style-v4", "none"],
    ["training that has the model's memory", "running", { ...READY, state: "released", message: "Training holds the model's memory (process 7)", training: { run: "style-v4", step: 7, numSteps: 40, leftS: 95 } }, [], "$(mortar-board) training style-v4: step 7 of 40, 2 min left", "none"],
    ["memory that is lent", "running", { ...READY, state: "released", message: "Training holds the model's memory (process 7)" }, [], "$(mortar-board) Training holds the model's memory (process 7)", "none"],
    ["no model", "running", { ...READY, state: "absent" }, [], "$(cloud-download) no model yet", "warning"],
    ["no memory", "running", { ...READY, state: "failed", reason: "memory" }, [], "$(warning) no model", "warning"],
    ["at work", "running", READY, [job({ stage: "plan", numTokens: 7 })], "$(loading~spin) planning: 7 tokens", "none"],
    ["two jobs", "running", READY, [job({ kind: "patch" }), job({})], "$(loading~spin) patching +1", "none"],
  ])("%s", (_, state, status, jobs, text, severity) => {
    const found = bar(state, status, jobs, t);
    expect(found.text).toBe(text);
    expect(found.severity).toBe(severity);
  });

  test("what a screen reader says has no icons in it", () => {
    expect(bar("running", READY, [job({})], t).label).toBe("PlanPatch: planning");
  });
});

test.each<[Partial<Job>, string]>([
  [{ state: "waiting", position: 2 }, "planning: 2 ahead in the queue"],
  [{ state: "waiting" }, "planning: waiting"],
  [{ state: "loading" }, "planning: the model is loading"],
  [{ kind: "patch", stage: "prove" }, "patching: checking"],
  [{ kind: "rollback", title: "rollback p_1" }, "rollback p_1"],
])("a job %o is told as %s", (more, words) => {
  expect(jobWords(job(more), t)).toBe(words);
});

test("a download can be cancelled like a job, and is named after the jobs", () => {
  const [first] = [job({})];
  expect(cancellable([first], { ...READY, state: "loading", isPulling: true }, t).map((one) => [one.jobId, one.title])).toEqual([
    ["j1", "plan for f"],
    ["pull", "download of qwen3-8b"],
  ]);
  expect(cancellable([first], { ...READY, isPulling: false }, t)).toEqual([first]);
  expect(cancellable([], null, t)).toEqual([]);
});

describe("the status view", () => {
  const said = (status: Status): Record<string, string> =>
    Object.fromEntries(rows(status, null, t).map((row) => [row.id, row.value]));

  test.each([
    ["done", "training style-v4 is done"],
    ["failed", "training style-v4 failed: The disk is full"],
    ["stopped", "training style-v4 was stopped"],
    ["cut off", "training style-v4 was cut off; --resume goes on with it"],
  ] as const)("a training run that ended is told of: %s", (state, words) => {
    const trainingEnd = { run: "style-v4", state, message: "The disk is full" };
    expect(said({ ...READY, training: null, trainingEnd }).trainingEnd).toBe(words);
    const training = { run: "style-v5", step: 1, numSteps: 40, leftS: null };
    expect(said({ ...READY, training, trainingEnd }).trainingEnd).toBeUndefined();
  });

  test("all that is known of a model that is ready", () => {
    expect(said(READY)).toEqual({
      model: "qwen3-8b",
      quantization: "int8",
      device: "cuda:0",
      adapter: "style-v3",
      memory: "9.6 GB",
      context: "32768 tokens",
      plan: "0.3 s, 16 tokens",
      patch: "2.0 s, 120 tokens",
      pending: "1",
      http: "http://127.0.0.1:8765",
      version: "0.1.0",
    });
  });

  test("of one that failed: why, and what to do", () => {
    const status: Status = { state: "failed", model: "qwen3-8b", message: "It needs 9 GB", hint: "Close something", jobs: [], pending: [] };
    expect(said(status)).toEqual({ model: "qwen3-8b: It needs 9 GB", hint: "Close something" });
  });

  test("a listener on another port says why", () => {
    expect(said({ ...READY, httpProblem: "8765 is taken" }).http).toBe("8765 is taken");
  });

  test("the A/B figures of an adapter", () => {
    const evaluation = { edits: { rows: 40, base: { right: 11 }, candidate: { right: 29 } }, general: { tasks: 25, base: 20, candidate: 21 } };
    expect(evaluationWords(evaluation, t)).toBe("edits 11 → 29 of 40; general tasks 20 → 21 of 25");
    expect(rows(READY, evaluation, t).find((row) => row.id === "evaluation")?.value).toContain("edits 11 → 29");
    expect(evaluationWords({}, t)).toBe("");
    expect(evaluationWords(null, t)).toBe("");
  });
});

test.each([
  [999_600_000, "1000 MB"],
  [1_500_000_000, "1.5 GB"],
  [1_000, "0 MB"],
])("%i bytes are %s", (count, words) => {
  expect(bytes(count)).toBe(words);
});
