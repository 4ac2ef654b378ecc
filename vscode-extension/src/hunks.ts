// Where the hunks of a patch are: in the text that it was made for, and in the patched text. Lines are 0-based here.

import type { Edit } from "./protocol";

export interface Lines {
  start: number;
  /** Inclusive; before `start` for an insertion: no line of the text is changed. */
  end: number;
}

/** The lines of the base that a hunk changes. */
export function baseLines(edit: Edit): Lines {
  return { start: edit.start_line - 1, end: edit.action === "insert" ? edit.start_line - 2 : edit.end_line - 1 };
}

/** The line where a hunk's lenses stand; an insertion behind the last line stands on that. */
export function lensLine(edit: Edit, numLines: number): number {
  return Math.max(0, Math.min(edit.start_line - 1, numLines - 1));
}

/** The lines of the patched text that each hunk made; `end` before `start` where it left nothing. */
export function patchedLines(edits: Edit[]): Lines[] {
  let shift = 0;
  const order = edits.map((_, index) => index).sort((a, b) => start(edits[a]) - start(edits[b]));
  const found: Lines[] = [];
  for (const index of order) {
    const edit = edits[index] as Edit;
    const removed = edit.action === "insert" ? 0 : edit.end_line - edit.start_line + 1;
    const added = edit.action === "delete" ? 0 : linesOf(edit.new).length;
    const first = edit.start_line - 1 + shift;
    found[index] = { start: first, end: first + added - 1 };
    shift += added - removed;
  }
  return found;
}

/** The hunk at a line, or the nearest one; -1 for no hunks. */
export function hunkAt(places: Lines[], line: number): number {
  let [best, distance] = [-1, Infinity];
  places.forEach(({ start: first, end }, index) => {
    const away = line < first ? first - line : line > end ? Math.max(0, line - Math.max(first, end)) : 0;
    if (away < distance) {
      [best, distance] = [index, away];
    }
  });
  return best;
}

/** The hunk after (or before) a line, around the end; -1 for no hunks. */
export function nextHunk(places: Lines[], line: number, step: 1 | -1): number {
  const startOf = (index: number): number => places[index]?.start ?? 0;
  const order = places.map((_, index) => index).sort((a, b) => (startOf(a) - startOf(b)) * step);
  return order.find((index) => (startOf(index) - line) * step > 0) ?? order[0] ?? -1;
}

/** A hunk as a diff, for a hover. */
export function hunkDiff(edit: Edit): string {
  const removed = edit.action === "insert" ? [] : linesOf(edit.pre).map((line) => `-${line}`);
  const added = edit.action === "delete" ? [] : linesOf(edit.new).map((line) => `+${line}`);
  return [...removed, ...added].join("\n");
}

function start(edit: Edit | undefined): number {
  return edit?.start_line ?? 0;
}

/** `pre` and `new` hold whole lines without the last one's terminator: "" is one empty line. */
function linesOf(text: string): string[] {
  return text.split(/\r\n|\r|\n/);
}
