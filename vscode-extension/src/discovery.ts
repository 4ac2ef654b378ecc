// Where the server comes from, in this order: the user's setting, the extension's own environment, `planpatch` on PATH, the
// workspace's interpreter (only if the workspace is trusted and the user chose that). Nothing is run to find out, and
// nothing that lies in a workspace is taken from PATH.

import * as path from "node:path";

/** Starts Python so that nothing of the current folder, PYTHONPATH or the user's packages is imported. */
export const ISOLATED = ["-I", "-X", "utf8", "-m", "lsp_server"];

export type Source = "setting" | "environment" | "path" | "interpreter";

export interface Launch {
  source: Source;
  command: string;
  args: string[];
}

export interface Machine {
  platform: NodeJS.Platform;
  env: Record<string, string | undefined>;
  home: string;
  isFile(file: string): boolean;
}

export interface Wanted {
  serverPath: string | null;
  serverArgs: string[] | null;
  /** Python of the extension's own environment, if that is complete. */
  environmentPython: string | null;
  /** The workspace's interpreter; null unless the workspace is trusted and the user chose to use it. */
  interpreter: string | null;
  /** Folders of the workspace. */
  workspaces: string[];
}

export class NotFoundError extends Error {
  constructor(
    readonly reason: "setting" | "nowhere",
    message: string,
  ) {
    super(message);
  }
}

/** How the server is started: everything before `lsp`. */
export function findServer(wanted: Wanted, machine: Machine): Launch {
  if (wanted.serverPath !== null) {
    return fromSetting(wanted.serverPath, wanted.serverArgs, machine);
  }
  if (wanted.environmentPython !== null && machine.isFile(wanted.environmentPython)) {
    return { source: "environment", command: wanted.environmentPython, args: ISOLATED };
  }
  const onPath = findOnPath("planpatch", machine, wanted.workspaces);
  if (onPath !== null) {
    return launcher("path", onPath, machine);
  }
  if (wanted.interpreter !== null && machine.isFile(wanted.interpreter)) {
    return { source: "interpreter", command: wanted.interpreter, args: ISOLATED };
  }
  throw new NotFoundError("nowhere", "PlanPatch's server is not installed");
}

function fromSetting(setting: string, args: string[] | null, machine: Machine): Launch {
  const paths = flavour(machine);
  const named = setting.replace(/^~(?=$|[\\/])/, machine.home);
  if (!paths.isAbsolute(named)) {
    throw new NotFoundError("setting", `planpatch.serverPath is "${setting}", which is no absolute path`);
  }
  if (!machine.isFile(named)) {
    throw new NotFoundError("setting", `planpatch.serverPath names ${named}, and there is no such file`);
  }
  if (args !== null) {
    return { source: "setting", command: named, args };
  }
  return launcher("setting", named, machine);
}

/** A Python is given what starts PlanPatch; the command `planpatch` is replaced by the Python beside it where it can be. */
function launcher(source: Source, file: string, machine: Machine): Launch {
  const paths = flavour(machine);
  if (isPython(paths.basename(file))) {
    return { source, command: file, args: ISOLATED };
  }
  if (machine.platform === "win32") {
    // Node starts no .cmd without a shell, and the launcher does nothing but this.
    for (const folder of [paths.dirname(file), paths.join(paths.dirname(file), "..")]) {
      const python = paths.join(folder, "python.exe");
      if (machine.isFile(python)) {
        return { source, command: python, args: ISOLATED };
      }
    }
  }
  return { source, command: file, args: [] };
}

export function isPython(name: string): boolean {
  return /^(python|pypy)[\d.]*(\.exe)?$/i.test(name);
}

/** The first file of that name in PATH's folders; relative folders and those inside a workspace are passed over. */
export function findOnPath(name: string, machine: Machine, workspaces: string[]): string | null {
  const paths = flavour(machine);
  const isWindows = machine.platform === "win32";
  const extensions = isWindows ? [".exe", ".cmd", ".bat"] : [""];
  const variable = Object.keys(machine.env).find((key) => (isWindows ? key.toUpperCase() === "PATH" : key === "PATH"));
  const folders = (variable === undefined ? "" : (machine.env[variable] ?? "")).split(paths.delimiter);
  for (const folder of folders.map((one) => one.replace(/^"(.*)"$/, "$1"))) {
    if (!paths.isAbsolute(folder) || workspaces.some((workspace) => isInside(folder, workspace, machine))) {
      continue;
    }
    for (const extension of extensions) {
      const file = paths.join(folder, name + extension);
      if (machine.isFile(file)) {
        return file;
      }
    }
  }
  return null;
}

export function isInside(file: string, folder: string, machine: Machine): boolean {
  const paths = flavour(machine);
  const isWindows = machine.platform === "win32";
  const fold = (one: string): string => (isWindows ? one.toLowerCase() : one);
  const relative = paths.relative(fold(folder), fold(file));
  return relative === "" || (!relative.startsWith("..") && !paths.isAbsolute(relative));
}

/** A Python to make an environment with: the setting, else the first on PATH that is no stub of Windows' store. */
export function findBasePython(setting: string | null, machine: Machine, workspaces: string[]): string | null {
  if (setting !== null) {
    return machine.isFile(setting) ? setting : null;
  }
  const names =
    machine.platform === "win32"
      ? ["py", "python3", "python"]
      : ["python3", "python3.14", "python3.13", "python3.12", "python3.11", "python3.10", "python"];
  for (const name of names) {
    const found = findOnPath(name, machine, workspaces);
    if (found !== null && !/[\\/]WindowsApps[\\/]/i.test(found)) {
      return found;
    }
  }
  return null;
}

function flavour(machine: Machine): path.PlatformPath {
  return machine.platform === "win32" ? path.win32 : path.posix;
}

/** Compares versions such as 0.1.0 and 0.2.0rc1 by their numbers. */
export function compareVersions(left: string, right: string): number {
  const numbers = (version: string): number[] => version.split(/[.+-]|(?=[a-z])/).map((part) => parseInt(part, 10) || 0);
  const [a, b] = [numbers(left), numbers(right)];
  for (let index = 0; index < 3; index++) {
    const difference = (a[index] ?? 0) - (b[index] ?? 0);
    if (difference !== 0) {
      return Math.sign(difference);
    }
  }
  return 0;
}

/** Whether the extension and a server of this version understand each other. */
export function isCompatible(version: string, range: { atLeast: string; below: string }): boolean {
  return (
    /^\d+\.\d+/.test(version) &&
    compareVersions(version, range.atLeast) >= 0 &&
    compareVersions(version, range.below) < 0
  );
}
