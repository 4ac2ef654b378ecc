import { describe, expect, test } from "vitest";
import { abilities, baseName, dayOf, icon, isFiltered, NO_FILTER, pages, tree } from "../../src/ledgerModel";
import type { LedgerPage, PatchState, Summary } from "../../src/protocol";

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
function shown(summaries: Summary[], grouping: "file" | "day"): string[] {
  return tree(summaries, grouping).flatMap((outer) => [
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
});

describe("pages", () => {
  const LEDGER = ["p_5", "p_4", "p_3", "p_2", "p_1"].map((id) => summary(id));
  const ask = (before: string | undefined): Promise<LedgerPage> => {
    const left = LEDGER.filter((one) => before === undefined || one.id < before);
    return Promise.resolve({ proposals: left.slice(0, 2), more: left.length > 2 });
  };

  test.each([
    [1, ["p_5", "p_4"], true],
    [2, ["p_5", "p_4", "p_3", "p_2"], true],
    [3, ["p_5", "p_4", "p_3", "p_2", "p_1"], false],
    [9, ["p_5", "p_4", "p_3", "p_2", "p_1"], false],
  ])("%i of them", async (num, ids, more) => {
    const found = await pages(num, ask);
    expect([found.proposals.map((one) => one.id), found.more]).toEqual([ids, more]);
  });
});

test("blanks are no filter", () => {
  expect([NO_FILTER, { text: "  ", states: [] }].some(isFiltered)).toBe(false);
  expect(isFiltered({ text: "", states: ["refused"] })).toBe(true);
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
