// The extension's settings: which are its own, which are the server's, and what the server is told. Defaults are null,
// which means not set: then the server's own sources (planpatch.toml, environment) count.

/** Settings that the server does not know. */
export const OWN_SETTINGS = [
  "serverPath",
  "serverArgs",
  "serverPackage",
  "serverPipArgs",
  "basePython",
  "useInterpreter",
  "home",
  "review",
  "historySize",
] as const;

/** Own settings that a running server depends on: when one changes, it is started anew. */
export const RESTART_SETTINGS = ["serverPath", "serverArgs", "useInterpreter", "home"] as const;

export type Review = "diff" | "inline" | "preview";

export interface OwnSettings {
  serverPath: string | null;
  serverArgs: string[] | null;
  serverPackage: string | null;
  serverPipArgs: string[] | null;
  basePython: string | null;
  useInterpreter: boolean;
  home: string | null;
  review: Review;
  historySize: number;
}

/** The section `planpatch` as `workspace.getConfiguration` has it. */
export type Section = Record<string, unknown>;

/** What the server is told: its own settings alone, those that are set. */
export function serverSection(section: Section): Section {
  const own = new Set<string>(OWN_SETTINGS);
  return Object.fromEntries(
    Object.entries(section).filter(
      ([name, value]) => !own.has(name) && value !== null && value !== undefined && typeof value !== "function",
    ),
  );
}

/** The extension's own settings; a value of another type than package.json allows counts as not set. */
export function ownSettings(section: Section): OwnSettings {
  return {
    serverPath: text(section.serverPath),
    serverArgs: texts(section.serverArgs),
    serverPackage: text(section.serverPackage),
    serverPipArgs: texts(section.serverPipArgs),
    basePython: text(section.basePython),
    useInterpreter: section.useInterpreter === true,
    home: text(section.home),
    review: section.review === "inline" || section.review === "preview" ? section.review : "diff",
    historySize: wholeNumber(section.historySize, 0, 500) ?? 50,
  };
}

/** Whether one of the settings that a running server was started with is another now. */
export function needsRestart(before: OwnSettings, after: OwnSettings): boolean {
  return RESTART_SETTINGS.some((name) => JSON.stringify(before[name]) !== JSON.stringify(after[name]));
}

function text(value: unknown): string | null {
  return typeof value === "string" && value.trim() !== "" ? value.trim() : null;
}

function texts(value: unknown): string[] | null {
  return Array.isArray(value) && value.every((one) => typeof one === "string") ? value : null;
}

function wholeNumber(value: unknown, low: number, high: number): number | null {
  return typeof value === "number" && Number.isInteger(value) && low <= value && value <= high ? value : null;
}
