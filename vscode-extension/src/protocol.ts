// The server's shapes, as lsp_server/{workbench,edit_jobs,language_server}.py and engine/patching write them. Nothing else
// in the extension knows how the server spells things.

/** What `initialize` asks for: our notifications, and that patches, ends of jobs and the model's state are left to us. */
export const CLIENT_OPTIONS = { notifications: true, presents: true } as const;

/** The oldest server that has everything the extension asks for, and the first version that may differ. */
export const SERVER_VERSIONS = { atLeast: "0.1.0", below: "0.2.0" } as const;

/** The download of a model, for `planpatch.cancel`: there is one at most. */
export const PULL_ID = "pull";

export type JobKind = "plan" | "patch" | "apply" | "rollback" | "redo" | "pull" | "model";
export type JobState = "waiting" | "loading" | "running" | "done" | "refused" | "failed" | "cancelled";

/** `PlanPatchError.to_json()`. */
export interface ServerError {
  code: string;
  message: string;
  hint: string;
  details: Record<string, unknown>;
}

export interface Timings {
  total_s: number;
  num_tokens: number;
  num_prompt_tokens: number;
}

export interface Plan {
  id: string;
  function: string;
  path: string;
  range: { start_line: number; end_line: number };
  intent: string;
  steps: string[];
  truncated: boolean;
  dropped: string[];
}

export interface Patch {
  patch_id: string;
  function: string;
  edits: Edit[];
  diff: string;
  gates: Gate[];
  timings: Timings;
  second_choice: boolean;
  known: boolean;
  warnings?: string[];
}

/** One edit; lines are 1-based and inclusive, `insert` goes before `start_line`. */
export interface Edit {
  action: "replace" | "insert" | "delete";
  start_line: number;
  end_line: number;
  pre: string;
  new: string;
}

/** `Verdict.to_json()`. */
export interface Gate {
  gate: string;
  ok: boolean;
  reason: string;
}

/** `Job.to_json()`; the fields after `numTokens` are the job's result. */
export interface Job {
  jobId: string;
  kind: JobKind;
  title: string;
  uri: string;
  function: string;
  state: JobState;
  stage: string;
  numTokens: number;
  position?: number;
  error?: ServerError;
  text?: string;
  planId?: string;
  plan?: Plan;
  planDocument?: string;
  patchId?: string;
  patch?: Patch;
  ok?: boolean;
  patchState?: string;
  reason?: string;
  hunks?: number[];
}

export interface Started {
  jobId: string;
  position: number;
}

export interface LastRun {
  totalS: number;
  numTokens: number;
}

export interface Status {
  /** `released`: another process of the user's, such as training, has the model's memory for a while. */
  state: "off" | "loading" | "ready" | "absent" | "failed" | "released";
  /** Why it failed: `held` is memory that another server holds; why it is absent: the user ended the download. */
  reason?: "memory" | "held" | "cancelled" | "";
  /** The model is being downloaded, and `PULL_ID` names that where a job is named. */
  isPulling?: boolean;
  model: string;
  message: string;
  hint: string;
  device?: string;
  quantization?: string;
  adapter?: string | null;
  memoryBytes?: number;
  contextLength?: number;
  jobs: Job[];
  pending: string[];
  last?: Partial<Record<"plan" | "patch", LastRun>>;
  version?: string;
  apply?: "ask" | "direct";
  http?: string;
  httpProblem?: string;
  training?: { run: string; step: number; numSteps: number; leftS: number | null } | null;
  /** How the last run ended that went on while this server ran. */
  trainingEnd?: TrainingEnd | null;
  presets?: Record<string, string>;
  plans?: { function: string; file: string; intent: string }[];
  /** Where a place was asked about: what would be changed there, the function empty for the whole file. */
  target?: { function: string; title: string } | null;
}

/** `cut off`: killed, and it goes on with `--resume`. */
export interface TrainingEnd {
  run: string;
  state: "done" | "failed" | "stopped" | "cut off";
  message: string;
}

export interface Place {
  line: number;
  character: number;
}

/** The one argument of every command. */
export interface Argument {
  uri?: string;
  range?: { start: Place; end: Place };
  position?: Place;
  function?: string;
  intent?: string;
  preset?: string;
  diagnostic?: unknown;
  planId?: string;
  patchId?: string;
  hunks?: number[];
  confirm?: boolean;
  feedback?: { hint?: string; reason?: string; accepted?: boolean };
  fresh?: boolean;
  jobId?: string;
  name?: string;
  limit?: number;
  /** Of the ledger: what was made before this proposal. */
  before?: string | undefined;
  /** Of the ledger: words that all stand in what was asked for, where, or why it was refused. */
  text?: string;
  states?: PatchState[];
}

export type PatchState =
  | "proposed"
  | "refused"
  | "applied"
  | "diverged"
  | "accepted"
  | "rejected"
  | "rolled_back"
  | "forgotten";

/** `Summary.to_json()`. */
export interface Summary {
  id: string;
  created_at: string;
  path: string | null;
  scope: string;
  intent: string;
  surface: string;
  state: PatchState;
  label: string;
  is_applied: boolean;
  num_hunks: number;
  error: string;
  model?: string;
  total_s?: number;
}

/** A page of the ledger, latest first. */
export interface LedgerPage {
  proposals: Summary[];
  /** Whether there are more, made before the last one. */
  more: boolean;
}

/** `Entry.to_json()`, as far as it is used. */
export interface Entry {
  id: string;
  created_at: string;
  state: PatchState;
  label: string;
  is_applied: boolean;
  hunks: number[];
  path: string | null;
  scope: string;
  start_line: number;
  end_line: number;
  base: string;
  patched: string | null;
  edits: Edit[];
  diff: string;
  intent: string;
  plan_text: string;
  preset: string;
  model: string;
  edit_format: string;
  gates: Gate[];
  error: ServerError | null;
  timings: Partial<Timings>;
  events: { seq: number; at: string; kind: string; data: Record<string, unknown> }[];
}

export interface ModelInfo {
  name: string;
  state: string;
  bytes: number;
  use?: string;
  licence?: string;
  [fact: string]: unknown;
}

/** The A/B gate's figures, as far as they are shown; training/evaluate.py writes them into an adapter's manifest. */
export interface Evaluation {
  edits?: { rows: number; base: { right: number }; candidate: { right: number } };
  general?: { tasks: number; base: number; candidate: number };
}

export interface AdapterInfo {
  folder: string;
  used: boolean;
  base: string;
  /** `ok`, or why it cannot be used. */
  state: string;
  evaluation: Evaluation | null;
}

export interface Adapters {
  adapter: string | null;
  setting: string;
  adapters: AdapterInfo[];
}

export interface Models extends Status {
  models: ModelInfo[];
}
