import { describe, expect, test } from "vitest";
import { baseLines, hunkAt, hunkDiff, lensLine, nextHunk, patchedLines } from "../../src/hunks";
import type { Edit } from "../../src/protocol";

function replace(first: number, last: number, text: string, pre = ""): Edit {
  return { action: "replace", start_line: first, end_line: last, pre, new: text };
}

function insert(before: number, text: string): Edit {
  return { action: "insert", start_line: before, end_line: before - 1, pre: "", new: text };
}

function remove(first: number, last: number): Edit {
  return { action: "delete", start_line: first, end_line: last, pre: "", new: "" };
}

/** The text after edits, as the server makes it: what `patchedLines` says is looked up in it. */
function patched(text: string, edits: Edit[]): string[] {
  const lines = text.split("\n");
  for (const edit of [...edits].sort((a, b) => b.start_line - a.start_line)) {
    const removed = edit.action === "insert" ? 0 : edit.end_line - edit.start_line + 1;
    lines.splice(edit.start_line - 1, removed, ...(edit.action === "delete" ? [] : edit.new.split("\n")));
  }
  return lines;
}

const TEXT = "one\ntwo\nthree\nfour\nfive\nsix";

test("lines are counted from 0, and an insertion changes none", () => {
  expect(baseLines(replace(2, 3, "x"))).toEqual({ start: 1, end: 2 });
  expect(baseLines(remove(1, 1))).toEqual({ start: 0, end: 0 });
  expect(baseLines(insert(4, "x"))).toEqual({ start: 3, end: 2 });
});

test("lenses stand in the text, also those of what comes behind its end", () => {
  expect(lensLine(insert(7, "seven"), 6)).toBe(5);
  expect(lensLine(replace(2, 3, "x"), 6)).toBe(1);
  expect(lensLine(insert(1, "x"), 0)).toBe(0);
});

describe("what each hunk made is found in the patched text", () => {
  test.each<[string, Edit[]]>([
    ["one line for one", [replace(2, 2, "TWO")]],
    ["more lines for one, and a hunk below", [replace(2, 2, "A\nB\nC"), replace(5, 5, "FIVE")]],
    ["fewer lines", [replace(1, 3, "ALL"), replace(6, 6, "SIX")]],
    ["insertions before the first line and behind the last", [insert(1, "zero\nhalf"), insert(7, "seven")]],
    ["a deletion between two", [replace(1, 1, "ONE"), remove(3, 4), replace(6, 6, "SIX")]],
    ["an empty line, which is a line", [replace(2, 2, ""), replace(4, 4, "x\n"), insert(6, "")]],
    ["in any order", [replace(5, 5, "E\nF"), replace(1, 1, "A\nB")]],
  ])("%s", (_, edits) => {
    const lines = patched(TEXT, edits);
    patchedLines(edits).forEach(({ start, end }, index) => {
      const edit = edits[index] as Edit;
      expect(lines.slice(start, end + 1)).toEqual(edit.action === "delete" ? [] : edit.new.split("\n"));
    });
  });
});

describe("the hunk that a cursor means", () => {
  const places = [replace(2, 3, "x"), insert(5, "y"), remove(8, 9)].map(baseLines);

  test.each([
    [0, 0],
    [1, 0],
    [2, 0],
    [3, 0],
    [4, 1],
    [5, 1],
    [6, 2],
    [8, 2],
    [99, 2],
  ])("at line %i it is hunk %i", (line, hunk) => {
    expect(hunkAt(places, line)).toBe(hunk);
  });

  test("without hunks there is none", () => {
    expect(hunkAt([], 3)).toBe(-1);
    expect(nextHunk([], 3, 1)).toBe(-1);
  });

  test("next and previous go round", () => {
    expect([0, 1, 4, 7, 20].map((line) => nextHunk(places, line, 1))).toEqual([0, 1, 2, 0, 0]);
    expect([0, 1, 4, 7, 20].map((line) => nextHunk(places, line, -1))).toEqual([2, 2, 0, 1, 2]);
  });
});

test("a hover shows a hunk as a diff, empty lines and carriage returns included", () => {
  expect(hunkDiff(replace(1, 2, "b\n\nc", "a\r\n"))).toBe("-a\n-\n+b\n+\n+c");
  expect(hunkDiff(insert(1, ""))).toBe("+");
  expect(hunkDiff({ ...remove(1, 1), pre: "gone" })).toBe("-gone");
});
