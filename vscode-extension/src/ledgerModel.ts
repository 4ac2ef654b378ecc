// The ledger as a tree: proposals by file and day, and what can be done with each. The server filters and pages.

import * as path from "node:path";
import type { LedgerPage, PatchState, Summary } from "./protocol";

export type Grouping = "file" | "day";

export interface Filter {
  text: string;
  states: PatchState[];
}

export const NO_FILTER: Filter = { text: "", states: [] };

export interface Group {
  kind: "file" | "day";
  /** A path, or a day such as 2026-11-26 in the user's time zone; "" for pasted code. */
  name: string;
  children: (Group | Leaf)[];
}

export interface Leaf {
  kind: "proposal";
  summary: Summary;
}

/** Files that hold days, or days that hold files; each level with the latest first. */
export function tree(summaries: Summary[], grouping: Grouping): Group[] {
  const levels: Grouping[] = grouping === "file" ? ["file", "day"] : ["day", "file"];
  return grouped(summaries, levels[0] as Grouping).map(([name, members]) => ({
    kind: levels[0] as Grouping,
    name,
    children: grouped(members, levels[1] as Grouping).map(([inner, leaves]) => ({
      kind: levels[1] as Grouping,
      name: inner,
      children: leaves.map((summary): Leaf => ({ kind: "proposal", summary })),
    })),
  }));
}

/** The first pages of the ledger as one; `ask` asks for those made before a proposal. */
export async function pages(
  num: number,
  ask: (before: string | undefined) => Promise<LedgerPage>,
): Promise<LedgerPage> {
  const proposals: Summary[] = [];
  let more = true;
  for (let page = 0; page < num && more; page++) {
    const answer = await ask(proposals.at(-1)?.id);
    proposals.push(...answer.proposals);
    more = answer.more;
  }
  return { proposals, more };
}

export function isFiltered(filter: Filter): boolean {
  return filter.text.trim() !== "" || filter.states.length > 0;
}

/** What the view's menus ask for, as words of a context value. */
export function abilities(summary: Summary): string {
  const isUsable = summary.state !== "refused" && summary.state !== "forgotten";
  const words = ["proposal"];
  const add = (word: string, isSo: boolean): void => {
    if (isSo) {
      words.push(word);
    }
  };
  add("refused", summary.state === "refused");
  add("hasGates", summary.state !== "forgotten");
  add("hasDiff", isUsable && summary.num_hunks > 0);
  add("canRollBack", summary.is_applied);
  add("canRedo", !summary.is_applied && summary.state === "rolled_back");
  add("canApply", !summary.is_applied && summary.state === "proposed");
  add("canKeep", summary.is_applied && summary.label !== "accepted");
  return words.join(" ");
}

/** The icon of a state; its colour is the theme's. */
export function icon(summary: Summary): { name: string; colour?: string } {
  switch (summary.state) {
    case "proposed":
      return { name: "git-pull-request" };
    case "refused":
      return { name: "circle-slash", colour: "problemsWarningIcon.foreground" };
    case "applied":
      return { name: "check", colour: "testing.iconPassed" };
    case "accepted":
      return { name: "pass-filled", colour: "testing.iconPassed" };
    case "diverged":
      return { name: "warning", colour: "problemsWarningIcon.foreground" };
    case "rejected":
      return { name: "close" };
    case "rolled_back":
      return { name: "discard" };
    case "forgotten":
      return { name: "trash" };
  }
}

export function baseName(file: string): string {
  return /^[A-Za-z]:[\\/]|\\/.test(file) ? path.win32.basename(file) : path.posix.basename(file);
}

export function dayOf(at: string): string {
  const time = new Date(at);
  const two = (number: number): string => String(number).padStart(2, "0");
  return `${time.getFullYear()}-${two(time.getMonth() + 1)}-${two(time.getDate())}`;
}

function grouped(summaries: Summary[], by: Grouping): [string, Summary[]][] {
  const groups = new Map<string, Summary[]>();
  for (const summary of summaries) {
    const name = by === "file" ? (summary.path ?? "") : dayOf(summary.created_at);
    groups.set(name, [...(groups.get(name) ?? []), summary]);
  }
  return [...groups]; // summaries come latest first, and so do the groups
}
