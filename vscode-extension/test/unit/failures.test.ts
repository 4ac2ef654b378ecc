import { describe, expect, test } from "vitest";
import { failureOf, REMEDIES, startFailure, Told } from "../../src/failures";
import type { Status } from "../../src/protocol";

function status(more: Partial<Status>): Status {
  return { state: "ready", model: "qwen", message: "", hint: "", jobs: [], pending: [], ...more };
}

test("every failure has a button", () => {
  expect(Object.values(REMEDIES).every((remedies) => remedies.length > 0)).toBe(true);
});

describe("what a status says", () => {
  test.each<[Partial<Status>, string | undefined]>([
    [{ state: "ready" }, undefined],
    [{ state: "loading", message: "31%" }, undefined],
    [{ state: "off" }, undefined],
    [{ state: "absent", message: "not here", hint: "pull it" }, "noModel"],
    [{ state: "absent", reason: "cancelled", message: "cancelled by the user" }, "noModel"],
    [{ state: "failed", reason: "memory" }, "noMemory"],
    [{ state: "failed", reason: "held" }, "held"],
    [{ state: "failed", reason: "", message: "no kernel image" }, "modelFailed"],
    [{ state: "failed" }, "modelFailed"],
  ])("%o", (more, kind) => {
    expect(failureOf(status(more))?.kind).toBe(kind);
  });

  test("the server's words come with it", () => {
    expect(failureOf(status({ state: "failed", message: "no room", hint: "close it" }))?.detail).toBe("no room. close it");
    expect(failureOf(status({ state: "absent", message: "not here", hint: "pull it" }))?.detail).toBe("not here");
  });
});

describe("a server that never answered", () => {
  test.each([
    ["/usr/bin/python: No module named lsp_server\n", "notInstalled"],
    ["ModuleNotFoundError: No module named 'lsp_server'", "notInstalled"],
    ["ModuleNotFoundError: No module named 'torch'", "cannotStart"],
    ["", "cannotStart"],
  ])("%s", (stderr, kind) => {
    expect(startFailure(1, stderr).kind).toBe(kind);
  });

  test("its last lines are told, or else how it ended", () => {
    expect(startFailure(1, "a\n\nb\r\nc\nd\n").detail).toBe("b\nc\nd");
    expect(startFailure(null, " \n").detail).toBe("exit code unknown");
    expect(startFailure(139, "").detail).toBe("exit code 139");
  });
});

test("a failure is told once, again after it was over, and when it is another", () => {
  const told = new Told();
  const failure = { kind: "noModel", detail: "a" } as const;
  expect(told.isNew(failure)).toBe(true);
  expect(told.isNew(failure)).toBe(false);
  expect(told.isNew({ ...failure, detail: "b" })).toBe(true);
  expect(told.isNew(null)).toBe(false);
  expect(told.isNew({ ...failure, detail: "b" })).toBe(true);
});
