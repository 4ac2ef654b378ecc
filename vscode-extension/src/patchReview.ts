// The state of one patch that waits for the user, and what each decision means. The document is never touched here: the
// answer to a decision is what the server is asked for, and the server looks at the text once more before it edits.
//
//     waiting ──(text differs)──▶ stale ──(text is back)──▶ waiting
//     waiting ──(last hunk decided, or all at once)──▶ applying ──▶ gone, or waiting again if nothing was applied
//     any ──(the server offers it no more)──▶ gone

import type { Edit, Entry } from "./protocol";

export type Phase = "waiting" | "stale" | "applying" | "gone";
export type Decision = "undecided" | "accepted" | "rejected";
export type Request = { do: "nothing" } | { do: "apply"; hunks: number[] } | { do: "reject" };

const NOTHING: Request = { do: "nothing" };

export class PatchReview {
  readonly decisions: Decision[];
  private now: Phase = "stale";

  /**
   * @param entry The proposal, with the text that it was made for.
   * @param text The document's text now; undefined while it is not open.
   */
  constructor(
    readonly entry: Pick<Entry, "id" | "base" | "edits">,
    text: string | undefined,
  ) {
    this.decisions = entry.edits.map(() => "undecided");
    this.textIs(text);
  }

  get phase(): Phase {
    return this.now;
  }

  /** Whether the user can decide now. */
  get isOpen(): boolean {
    return this.now === "waiting";
  }

  get edits(): Edit[] {
    return this.entry.edits;
  }

  numUndecided(): number {
    return this.decisions.filter((decision) => decision === "undecided").length;
  }

  /** Take in the document's text; true if the phase is another now. */
  textIs(text: string | undefined): boolean {
    if (this.now === "gone" || this.now === "applying") {
      return false; // while it is applied the text is on its way to become the patched one
    }
    const phase: Phase = text !== undefined && isSameText(text, this.entry.base) ? "waiting" : "stale";
    const isChanged = phase !== this.now;
    this.now = phase;
    return isChanged;
  }

  /** Accept or reject one hunk; a second time takes it back. When none is undecided, the patch is applied or rejected. */
  decide(hunk: number, decision: "accepted" | "rejected"): Request {
    if (!this.isOpen || this.decisions[hunk] === undefined) {
      return NOTHING;
    }
    this.decisions[hunk] = this.decisions[hunk] === decision ? "undecided" : decision;
    return this.numUndecided() === 0 ? this.conclude() : NOTHING;
  }

  /** Apply every hunk that was not rejected. */
  applyRest(): Request {
    if (!this.isOpen) {
      return NOTHING;
    }
    this.decisions.forEach((decision, index) => {
      this.decisions[index] = decision === "undecided" ? "accepted" : decision;
    });
    return this.conclude();
  }

  rejectAll(): Request {
    if (this.now !== "waiting" && this.now !== "stale") {
      return NOTHING;
    }
    this.decisions.fill("rejected");
    return this.conclude();
  }

  /** What was asked for is done, or was not: then the user decides anew, unless the text is another by now. */
  ended(isDone: boolean, text: string | undefined): void {
    if (this.now !== "applying") {
      return;
    }
    if (isDone) {
      this.now = "gone";
      return;
    }
    this.decisions.fill("undecided");
    this.now = "stale";
    this.textIs(text);
  }

  /** The server offers it no more. One that is being applied is waited for. */
  withdrawn(): void {
    if (this.now !== "applying") {
      this.now = "gone";
    }
  }

  private conclude(): Request {
    this.now = "applying";
    const hunks = this.decisions.flatMap((decision, index) => (decision === "accepted" ? [index] : []));
    return hunks.length === 0 ? { do: "reject" } : { do: "apply", hunks };
  }
}

/** Whether two texts are the same to the byte, but for a byte order mark, which editors keep out of their texts. */
export function isSameText(left: string, right: string): boolean {
  return left.replace(/^\ufeff/, "") === right.replace(/^\ufeff/, "");
}
