import { describe, expect, test } from "vitest";
import { abilities, baseName, dayOf, type Filter, icon, isFiltered, isKept, NO_FILTER, tree } from "../../src/ledgerModel";
import type { PatchState, Summary } from "../../src/protocol";

const STATES: PatchState[] = ["proposed", "refused", "applied", "diverged", "accepted", "rejected", "rolled_back", "forgotten"];

function summary(id: string, more: Partial<Summary> = {}): Summary {
  return {
    id,
    created_at: "2026-11-26T12:00:00+00:00",
    path: "/w/a.py",
    scope: "f",
    intent: "add them",
    surface: "lsp",
    state: "applied",
    label: "unreviewed",
    is_applied: true,
    num_hunks: 1,
    error: "",
    model: "qwen",
    ...more,
  };
}

/** The tree as indented text. */
function shown(summaries: Summary[], grouping: "file" | "day", filter: Filter = NO_FILTER): string[] {
  return tree(summaries, grouping, filter).flatMap((outer) => [
    outer.name,
    ...outer.children.flatMap((inner) =>
      inner.kind === "proposal"
        ? []
        : [`  ${inner.name}`, ...inner.children.map((leaf) => (leaf.kind === "proposal" ? `    ${leaf.summary.id}` : ""))],
    ),
  ]);
}

const THREE = [
  summary("p_3", { created_at: "2026-11-27T12:00:00+00:00", path: "/w/b.py" }),
  summary("p_2", { created_at: "2026-11-26T13:00:00+00:00" }),
  summary("p_1", { path: null }),
  summary("p_0", { created_at: "2026-11-25T12:00:00+00:00", path: "/w/b.py" }),
];

describe("the tree", () => {
  test("files hold days, the latest first", () => {
    expect(shown(THREE, "file")).toEqual([
      "/w/b.py",
      "  2026-11-27",
      "    p_3",
      "  2026-11-25",
      "    p_0",
      "/w/a.py",
      "  2026-11-26",
      "    p_2",
      "",
      "  2026-11-26",
      "    p_1",
    ]);
  });

  test("days hold files", () => {
    expect(shown(THREE, "day").filter((line) => !line.startsWith("  "))).toEqual(["2026-11-27", "2026-11-26", "2026-11-25"]);
  });

  test("a day is the user's, not Greenwich's", () => {
    const at = new Date(2026, 10, 26, 0, 30);
    expect(dayOf(at.toISOString())).toBe("2026-11-26");
  });

  test("a group with nothing left is not shown", () => {
    expect(shown(THREE, "file", { text: "a.py", states: [] })).toEqual(["/w/a.py", "  2026-11-26", "    p_2"]);
    expect(shown(THREE, "file", { text: "no such", states: [] })).toEqual([]);
  });
});

describe("the filter", () => {
  test.each([
    ["", true],
    ["ADD", true],
    ["them add", true],
    ["them subtract", false],
    ["a.py qwen", true],
    ["undefined", true],
  ])("%s", (text, isFound) => {
    expect(isKept(summary("p_1", { error: "x would be undefined" }), { text, states: [] })).toBe(isFound);
  });

  test("states count besides words", () => {
    const refused = summary("p_1", { state: "refused" });
    expect(isKept(refused, { text: "add", states: ["refused", "applied"] })).toBe(true);
    expect(isKept(refused, { text: "add", states: ["applied"] })).toBe(false);
  });

  test("blanks are no filter", () => {
    expect([NO_FILTER, { text: "  ", states: [] }].some(isFiltered)).toBe(false);
    expect(isFiltered({ text: "", states: ["refused"] })).toBe(true);
  });
});

describe("what can be done with a proposal", () => {
  const can = (more: Partial<Summary>): string[] => abilities(summary("p", more)).split(" ").slice(1);

  test.each<[string, Partial<Summary>, string[]]>([
    ["waits", { state: "proposed", is_applied: false }, ["hasGates", "hasDiff", "canApply"]],
    ["is applied", { state: "applied" }, ["hasGates", "hasDiff", "canRollBack", "canKeep"]],
    ["is applied and kept", { state: "accepted", label: "accepted" }, ["hasGates", "hasDiff", "canRollBack"]],
    ["was rolled back", { state: "rolled_back", is_applied: false }, ["hasGates", "hasDiff", "canRedo"]],
    ["was refused", { state: "refused", is_applied: false, num_hunks: 0 }, ["refused", "hasGates"]],
    ["was rejected", { state: "rejected", is_applied: false }, ["hasGates", "hasDiff"]],
    ["was forgotten", { state: "forgotten", is_applied: false }, []],
  ])("one that %s", (_, more, words) => {
    expect(can(more)).toEqual(words);
  });

  test("every state has an icon of its own", () => {
    const names = STATES.map((state) => icon(summary("p", { state })).name);
    expect(new Set(names).size).toBe(STATES.length);
  });
});

test.each([
  ["/w/a b.py", "a b.py"],
  ["C:\\w\\a.py", "a.py"],
  ["c:/w/a.py", "a.py"],
  ["/w/back\\slash.py", "slash.py"],
])("the name of %s is %s", (file, name) => {
  expect(baseName(file)).toBe(name);
});
