import { describe, expect, test } from "vitest";
import { PatchReview, type Phase } from "../../src/patchReview";
import type { Edit } from "../../src/protocol";

const BASE = "def f(x):\r\n\treturn x  # 🙂\r\n";

function edit(line: number): Edit {
  return { action: "replace", start_line: line, end_line: line, pre: "", new: "x" };
}

function review(numHunks = 3, text: string | undefined = BASE): PatchReview {
  const edits = Array.from({ length: numHunks }, (_, index) => edit(index + 1));
  return new PatchReview({ id: "p_1", base: BASE, edits }, text);
}

describe("hunk by hunk", () => {
  test("nothing is asked of the server before the last hunk is decided", () => {
    const patch = review();
    expect(patch.decide(0, "accepted")).toEqual({ do: "nothing" });
    expect(patch.decide(1, "rejected")).toEqual({ do: "nothing" });
    expect(patch.numUndecided()).toBe(1);
    expect(patch.decide(2, "accepted")).toEqual({ do: "apply", hunks: [0, 2] });
    expect(patch.phase).toBe("applying");
  });

  test("a decision is taken back by making it again, and changed by the other one", () => {
    const patch = review();
    patch.decide(0, "accepted");
    patch.decide(0, "accepted");
    expect(patch.decisions[0]).toBe("undecided");
    patch.decide(0, "accepted");
    patch.decide(0, "rejected");
    expect(patch.decisions[0]).toBe("rejected");
  });

  test("when every hunk is rejected so is the patch", () => {
    const patch = review(2);
    patch.decide(0, "rejected");
    expect(patch.decide(1, "rejected")).toEqual({ do: "reject" });
  });

  test("there is no hunk beyond the last", () => {
    expect(review(1).decide(1, "accepted")).toEqual({ do: "nothing" });
    expect(review(1).decide(-1, "accepted")).toEqual({ do: "nothing" });
  });
});

describe("all at once", () => {
  test("apply takes every hunk that was not rejected", () => {
    const patch = review();
    patch.decide(1, "rejected");
    expect(patch.applyRest()).toEqual({ do: "apply", hunks: [0, 2] });
  });

  test("reject takes them all, whatever was accepted", () => {
    const patch = review();
    patch.decide(1, "accepted");
    expect(patch.rejectAll()).toEqual({ do: "reject" });
  });
});

describe("no patch lands on a text that it was not made for", () => {
  test.each([
    ["another letter", BASE.replace("x  #", "y  #")],
    ["other line ends", BASE.replaceAll("\r\n", "\n")],
    ["no last line end", BASE.trimEnd()],
    ["a tab more", `${BASE}\t`],
    ["nothing", ""],
  ])("%s", (_, text) => {
    const patch = review(1, text);
    expect(patch.phase).toBe("stale");
    expect(patch.decide(0, "accepted")).toEqual({ do: "nothing" });
    expect(patch.applyRest()).toEqual({ do: "nothing" });
  });

  test("a document that is not open has no text that fits", () => {
    const patch = new PatchReview({ id: "p_1", base: BASE, edits: [edit(1)] }, undefined);
    expect(patch.phase).toBe("stale");
    expect(patch.applyRest()).toEqual({ do: "nothing" });
  });

  test("a byte order mark is no part of an editor's text", () => {
    const patch = new PatchReview({ id: "p_1", base: `\ufeff${BASE}`, edits: [edit(1)] }, BASE);
    expect(patch.phase).toBe("waiting");
  });

  test("typing closes it, undo opens it again, and decisions stay", () => {
    const patch = review();
    patch.decide(0, "accepted");
    expect(patch.textIs(`${BASE}x`)).toBe(true);
    expect(patch.textIs(`${BASE}xy`)).toBe(false);
    expect(patch.decide(1, "accepted")).toEqual({ do: "nothing" });
    expect(patch.textIs(BASE)).toBe(true);
    expect(patch.decisions).toEqual(["accepted", "undecided", "undecided"]);
  });

  test("a stale one can still be rejected", () => {
    expect(review(1, "other").rejectAll()).toEqual({ do: "reject" });
  });
});

describe("what the server answers", () => {
  function applying(): PatchReview {
    const patch = review(2);
    patch.applyRest();
    return patch;
  }

  test("while it is applied nothing else can be decided, and the text may change", () => {
    const patch = applying();
    expect(patch.decide(0, "rejected")).toEqual({ do: "nothing" });
    expect(patch.applyRest()).toEqual({ do: "nothing" });
    expect(patch.rejectAll()).toEqual({ do: "nothing" });
    expect(patch.textIs("patched")).toBe(false);
    patch.withdrawn(); // the server offers it no more, because it is in the text
    expect(patch.phase).toBe("applying");
  });

  test.each<[string, boolean, string | undefined, Phase]>([
    ["done", true, "patched", "gone"],
    ["not done, the text is as it was", false, BASE, "waiting"],
    ["not done, the text is another", false, "other", "stale"],
    ["not done, the file was closed", false, undefined, "stale"],
  ])("%s", (_, isDone, text, phase) => {
    const patch = applying();
    patch.ended(isDone, text);
    expect(patch.phase).toBe(phase);
    expect(patch.isOpen).toBe(phase === "waiting");
  });

  test("after a failure every hunk is undecided again", () => {
    const patch = applying();
    patch.ended(false, BASE);
    expect(patch.decisions).toEqual(["undecided", "undecided"]);
    expect(patch.applyRest()).toEqual({ do: "apply", hunks: [0, 1] });
  });

  test("what is gone stays gone", () => {
    const patch = review(1);
    patch.withdrawn();
    patch.textIs(BASE);
    patch.ended(false, BASE);
    expect(patch.phase).toBe("gone");
    expect(patch.applyRest()).toEqual({ do: "nothing" });
    expect(patch.rejectAll()).toEqual({ do: "nothing" });
  });
});

test("whatever happens in whatever order, hunks are asked for only while the text is the patch's own", () => {
  let seed = 1;
  const random = (below: number): number => {
    seed = (seed * 1103515245 + 12345) % 2 ** 31;
    return seed % below;
  };
  let numApplied = 0;
  for (let round = 0; round < 2000; round++) {
    const patch = review(1 + random(3));
    let text: string | undefined = BASE;
    for (let step = 0; step < 12; step++) {
      const hunk = random(3);
      const requests = [
        () => patch.decide(hunk, "accepted"),
        () => patch.decide(hunk, "rejected"),
        () => patch.applyRest(),
        () => patch.rejectAll(),
      ];
      const [before, phase] = [text, patch.phase];
      const action = random(9);
      const request = requests[action]?.();
      if (request?.do === "apply") {
        numApplied += 1;
        expect(before).toBe(BASE);
        expect(phase).toBe("waiting");
        expect(request.hunks.every((index) => patch.edits[index] !== undefined)).toBe(true);
        expect(request.hunks.length).toBeGreaterThan(0);
      } else if (action >= 4 && action < 7) {
        text = [BASE, `${BASE}#`, undefined][random(3)];
        patch.textIs(text);
      } else if (action === 7) {
        patch.ended(random(2) === 0, text);
      } else if (action === 8 && random(4) === 0) {
        patch.withdrawn();
      }
    }
  }
  expect(numApplied).toBeGreaterThan(300);
});
