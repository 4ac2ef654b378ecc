import { expect, test } from "vitest";
import { lensLineOf, planMark } from "../../src/planMark";

const FACTS = { path: "/w/a b.py", function: "Box.area", plan: "pl_1" };

test.each([
  ["as the server writes it", `<!-- planpatch ${JSON.stringify(FACTS)} -->`, FACTS],
  ["with a byte order mark and a carriage return", `\ufeff<!-- planpatch ${JSON.stringify(FACTS)} -->\r`, FACTS],
  ["two hyphens in a name", `<!-- planpatch {"path": "/w/-\\u002d.py", "function": "", "plan": ""} -->`, { path: "/w/--.py", function: "", plan: "" }],
  ["another document", "# Notes", null],
  ["an empty one", "", null],
  ["JSON that the user broke", '<!-- planpatch {"path": -->', null],
  ["JSON that lacks the plan", '<!-- planpatch {"path": "/a.py", "function": "f"} -->', null],
  ["JSON of another shape", '<!-- planpatch {"path": 1, "function": "f", "plan": ""} -->', null],
  ["not at the beginning", ` <!-- planpatch ${JSON.stringify(FACTS)} -->`, null],
])("the first line says what a plan is for: %s", (_, line, mark) => {
  expect(planMark(line)).toEqual(mark);
});

test("lenses stand at the plan, else at the intent, else at the top", () => {
  expect(lensLineOf(["x", "## Intent", "y", "## Plan  "])).toBe(3);
  expect(lensLineOf(["x", "## Intent", "## Planned"])).toBe(1);
  expect(lensLineOf(["x"])).toBe(0);
});
