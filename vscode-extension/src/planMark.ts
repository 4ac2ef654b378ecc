// The first line of a plan document says which function of which file it is for; lsp_server/plan_documents.py writes it.

export interface PlanMark {
  path: string;
  /** Qualified name; empty for the whole file. */
  function: string;
  /** The plan in the ledger; empty while only an intent was asked for. */
  plan: string;
}

const MARK = /^\ufeff?<!-- planpatch (\{.*\}) -->\s*$/;

/** The mark in a document's first line; null for any other document. */
export function planMark(firstLine: string): PlanMark | null {
  const found = MARK.exec(firstLine);
  if (found === null) {
    return null;
  }
  let facts: unknown;
  try {
    facts = JSON.parse(found[1] as string);
  } catch {
    return null; // the user wrote over it
  }
  const { path, function: name, plan } = facts as Record<string, unknown>;
  return typeof path === "string" && typeof name === "string" && typeof plan === "string"
    ? { path, function: name, plan }
    : null;
}

/** The line of the heading `## Plan`, else of `## Intent`, else the first. */
export function lensLineOf(lines: string[]): number {
  const at = (heading: RegExp): number => lines.findIndex((line) => heading.test(line));
  return Math.max(0, [at(/^##[ \t]+Plan[ \t]*$/), at(/^##[ \t]+Intent[ \t]*$/)].find((line) => line >= 0) ?? 0);
}
