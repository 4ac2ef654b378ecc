// What the status bar and the status view say, from what the server says of itself.

import type { ConnectionState } from "./connection";
import { PULL_ID } from "./protocol";
import type { Evaluation, Job, LastRun, Status, TrainingEnd } from "./protocol";

/** Puts words into the user's language; `vscode.l10n.t`. */
export type Translate = (message: string, ...args: (string | number)[]) => string;

export interface Bar {
  text: string;
  /** What a screen reader says: the same without icons. */
  label: string;
  severity: "none" | "warning" | "error";
}

/** The status bar item. */
export function bar(state: ConnectionState, status: Status | null, jobs: Job[], t: Translate): Bar {
  const say = (icon: string, words: string, severity: Bar["severity"] = "none"): Bar => ({
    text: `$(${icon}) ${words}`,
    label: words.startsWith("PlanPatch") ? words : `PlanPatch: ${words}`,
    severity,
  });
  const [first] = jobs;
  if (first !== undefined) {
    const ahead = jobs.length > 1 ? ` +${jobs.length - 1}` : "";
    return say("loading~spin", `${jobWords(first, t)}${ahead}`);
  }
  if (state === "starting") {
    return say("loading~spin", t("PlanPatch: starting"));
  }
  if (state === "failed") {
    return say("error", t("PlanPatch: not running"), "error");
  }
  if (state === "off" || status === null) {
    return say("sparkle", "PlanPatch");
  }
  if (status.training && (status.state === "ready" || status.state === "released")) {
    return say("mortar-board", trainingWords(status.training, t));
  }
  switch (status.state) {
    case "ready":
      return say("sparkle", [status.model, ...adapterName(status.adapter)].join(" + "));
    case "off":
    case "loading":
      return say("loading~spin", status.message === "" ? t("loading the model") : status.message);
    case "absent":
      return say("cloud-download", t("no model yet"), "warning");
    case "failed":
      return say("warning", t("no model"), "warning");
    case "released":
      return say("mortar-board", status.message);
  }
}

/** What can be cancelled: jobs, and the download of a model. */
export function cancellable(jobs: Job[], status: Status | null, t: Translate): Pick<Job, "jobId" | "title" | "function">[] {
  const pull = { jobId: PULL_ID, title: t("download of {0}", status?.model ?? ""), function: "" };
  return status?.isPulling === true ? [...jobs, pull] : jobs;
}

/** A job in a few words: what it does and how far it is. */
export function jobWords(job: Job, t: Translate): string {
  const what = job.kind === "plan" ? t("planning") : job.kind === "patch" ? t("patching") : job.title;
  if (job.state === "waiting") {
    const isQueued = job.position !== undefined && job.position > 0;
    return isQueued ? t("{0}: {1} ahead in the queue", what, job.position ?? 0) : t("{0}: waiting", what);
  }
  if (job.state === "loading") {
    return t("{0}: the model is loading", what);
  }
  if (job.stage === "prove") {
    return t("{0}: checking", what);
  }
  return job.numTokens > 0 ? t("{0}: {1} tokens", what, job.numTokens) : what;
}

export interface Row {
  id: string;
  label: string;
  value: string;
  icon: string;
}

/** The rows of the status view. */
export function rows(status: Status, evaluation: Evaluation | null, t: Translate): Row[] {
  const found: Row[] = [];
  const add = (id: string, icon: string, label: string, value: string | undefined): void => {
    if (value !== undefined && value !== "") {
      found.push({ id, icon, label, value });
    }
  };
  const isReady = status.state === "ready";
  add("model", "server", t("Model"), [status.model, isReady ? "" : status.message].filter((one) => one !== "").join(": "));
  add("hint", "info", t("What to do"), isReady ? "" : status.hint);
  add("quantization", "package", t("Quantization"), status.quantization);
  add("device", "circuit-board", t("Device"), status.device);
  if (isReady) {
    add("adapter", "extensions", t("Adapter"), adapterName(status.adapter)[0] ?? t("none: the base model"));
    add("evaluation", "graph", t("A/B figures"), evaluationWords(evaluation, t));
  }
  add("training", "mortar-board", t("Training"), status.training ? trainingWords(status.training, t) : "");
  if (!status.training) {
    add("trainingEnd", "mortar-board", t("Training"), status.trainingEnd ? trainingEndWords(status.trainingEnd, t) : "");
  }
  add("memory", "dashboard", t("Memory"), status.memoryBytes ? bytes(status.memoryBytes) : "");
  add("context", "symbol-ruler", t("Context"), status.contextLength ? t("{0} tokens", status.contextLength) : "");
  add("plan", "notebook", t("Last plan"), runWords(status.last?.plan, t));
  add("patch", "diff", t("Last patch"), runWords(status.last?.patch, t));
  add("pending", "git-pull-request", t("Patches that wait"), status.pending.length > 0 ? String(status.pending.length) : "");
  add("http", "globe", "HTTP", status.httpProblem !== undefined && status.httpProblem !== "" ? status.httpProblem : status.http);
  add("version", "versions", t("Server"), status.version);
  return found;
}

/** Paired figures: how many held-out edits the base model and the adapter got right. */
export function evaluationWords(evaluation: Evaluation | null, t: Translate): string {
  const { edits, general } = evaluation ?? {};
  const parts = [
    edits === undefined ? "" : t("edits {0} → {1} of {2}", edits.base.right, edits.candidate.right, edits.rows),
    general === undefined ? "" : t("general tasks {0} → {1} of {2}", general.base, general.candidate, general.tasks),
  ];
  return parts.filter((part) => part !== "").join("; ");
}

function trainingWords(training: NonNullable<Status["training"]>, t: Translate): string {
  const { run, step, numSteps, leftS } = training;
  if (numSteps === 0) {
    return t("training {0}", run);
  }
  return leftS === null
    ? t("training {0}: step {1} of {2}", run, step, numSteps)
    : t("training {0}: step {1} of {2}, {3} min left", run, step, numSteps, Math.ceil(leftS / 60));
}

export function trainingEndWords({ run, state, message }: TrainingEnd, t: Translate): string {
  switch (state) {
    case "done":
      return t("training {0} is done", run);
    case "failed":
      return t("training {0} failed: {1}", run, message);
    case "stopped":
      return t("training {0} was stopped", run);
    case "cut off":
      return t("training {0} was cut off; --resume goes on with it", run);
  }
}

function runWords(run: LastRun | undefined, t: Translate): string {
  return run === undefined ? "" : t("{0} s, {1} tokens", run.totalS.toFixed(1), run.numTokens);
}

function adapterName(adapter: string | null | undefined): string[] {
  return adapter ? [adapter.replace(/[\\/]+$/, "").replace(/^.*[\\/]/, "")] : [];
}

export function bytes(count: number): string {
  return count >= 1e9 ? `${(count / 1e9).toFixed(1)} GB` : `${Math.round(count / 1e6)} MB`;
}
