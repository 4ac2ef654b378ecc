// What can be wrong with the server, and what the user can do about it: one message with buttons for each.

import type { Status } from "./protocol";

export type FailureKind =
  | "untrusted"
  | "notInstalled"
  | "badPath"
  | "noPython"
  | "cannotStart"
  | "version"
  | "crashed"
  | "noModel"
  | "noMemory"
  | "held"
  | "modelFailed"
  | "portTaken"
  | "installFailed"
  | "outdated";

/** What a button does; `connection.ts` and `commands.ts` know how. */
export type Remedy =
  | "trust"
  | "install"
  | "update"
  | "settings"
  | "basePython"
  | "log"
  | "doctor"
  | "restart"
  | "pull"
  | "chooseModel";

export const REMEDIES: Record<FailureKind, Remedy[]> = {
  untrusted: ["trust"],
  notInstalled: ["install", "settings"],
  badPath: ["settings", "install"],
  noPython: ["basePython"],
  cannotStart: ["settings", "log", "doctor", "install"],
  version: ["install", "settings"],
  crashed: ["restart", "log", "doctor"],
  noModel: ["pull", "chooseModel"],
  noMemory: ["chooseModel", "doctor"],
  held: ["restart", "chooseModel"],
  modelFailed: ["restart", "log", "doctor", "chooseModel"],
  portTaken: ["settings"],
  outdated: ["update"],
  installFailed: ["log", "install", "settings"],
};

export interface Failure {
  kind: FailureKind;
  /** What is known beyond the kind: the server's own words. */
  detail: string;
}

/** What a status of the server says that the user should do something about; null for nothing. */
export function failureOf(status: Status): Failure | null {
  const detail = [status.message, status.hint].filter((part) => part !== "").join(". ");
  if (status.state === "absent") {
    return { kind: "noModel", detail: status.message }; // the hint is the button
  }
  if (status.state === "failed") {
    const kind = status.reason === "held" ? "held" : status.reason === "memory" ? "noMemory" : "modelFailed";
    return { kind, detail };
  }
  return null;
}

/** What the end of a server that never answered says. */
export function startFailure(exit: number | string | null, stderr: string): Failure {
  const lines = stderr.trim().split(/\r?\n/).filter((line) => line.trim() !== "");
  const detail = lines.slice(-3).join("\n") || (typeof exit === "string" ? `ended by ${exit}` : `exit code ${exit ?? "unknown"}`);
  return { kind: /No module named '?"?lsp_server/.test(stderr) ? "notInstalled" : "cannotStart", detail };
}

/** Tells each failure once, until it is over or another one comes. */
export class Told {
  private last = "";

  isNew(failure: Failure | null): boolean {
    const key = failure === null ? "" : `${failure.kind}: ${failure.detail}`;
    const isNew = key !== "" && key !== this.last;
    this.last = key;
    return isNew;
  }
}
