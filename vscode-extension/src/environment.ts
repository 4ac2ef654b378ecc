// The extension's own environment: made on request with the user's Python and pip, used only once it is complete. Each one
// is a folder of its own, and a small file names the current one, so that an install that is broken off leaves what was
// there before. Knows no editor.

import { type ChildProcess, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import * as path from "node:path";

export const CUDA_INDEX = "https://download.pytorch.org/whl/cu128"; // as `planpatch doctor` says
export const CPU_INDEX = "https://download.pytorch.org/whl/cpu";
const FEW_TRIES = ["--retries", "2", "--timeout", "20"]; // a network that blocks it is no reason to wait for minutes
const QUIET = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"];
const OLDEST_PYTHON = [3, 10] as const;
const CURRENT = "current.json";

export interface Installed {
  folder: string;
  requirement: string;
  digest: string;
}

export interface InstallOptions {
  basePython: string;
  /** What to install; null: the wheel that comes with the extension. */
  requirement: string | null;
  pipArgs: string[] | null;
  hasNvidia: boolean;
  platform: NodeJS.Platform;
  progress: (message: string) => void;
  signal: AbortSignal;
}

export class InstallError extends Error {
  constructor(
    readonly reason: "python" | "venv" | "pip" | "wheel" | "cancelled",
    message: string,
  ) {
    super(message);
  }
}

export interface Step {
  title: string;
  args: string[];
  /** Whether the next step makes up for its failure. */
  mayFail: boolean;
}

export class PrivateEnvironment {
  private readonly root: string;

  /**
   * @param storage The extension's folder among the user's data.
   * @param bundled The folder of the wheel that comes with the extension.
   * @param log Takes each line that pip writes.
   */
  constructor(
    storage: string,
    private readonly bundled: string,
    private readonly log: (line: string) => void,
  ) {
    this.root = path.join(storage, "environments");
  }

  /** Its Python; null if there is no complete environment. */
  python(): string | null {
    const installed = this.installed();
    if (installed === null) {
      return null;
    }
    const python = pythonOf(path.join(this.root, installed.folder), process.platform);
    return existsSync(python) ? python : null;
  }

  installed(): Installed | null {
    try {
      const found = JSON.parse(readFileSync(path.join(this.root, CURRENT), "utf8")) as Partial<Installed>;
      const { folder, requirement, digest } = found;
      const isOurs = typeof folder === "string" && path.basename(folder) === folder;
      return isOurs && typeof requirement === "string" && typeof digest === "string"
        ? { folder, requirement, digest }
        : null;
    } catch {
      return null; // not there, or not ours: there is none, and `install` makes one
    }
  }

  /** The wheel that comes with the extension. */
  wheel(): string | null {
    const names = existsSync(this.bundled) ? readdirSync(this.bundled).filter((name) => name.endsWith(".whl")) : [];
    return names.length === 1 && names[0] !== undefined ? path.join(this.bundled, names[0]) : null;
  }

  /** The versions that the bundled wheel was tested with. */
  private constraints(): string {
    return path.join(this.bundled, "constraints.txt");
  }

  /** Whether another wheel comes with the extension than the one that the environment was made from. */
  isOutdated(): boolean {
    const [installed, wheel] = [this.installed(), this.wheel()];
    return installed !== null && wheel !== null && installed.digest !== "" && installed.digest !== digestOf(wheel);
  }

  /** Make it, or make it anew. Throws InstallError. */
  async install(options: InstallOptions): Promise<void> {
    const requirement = options.requirement ?? this.wheel();
    if (requirement === null) {
      throw new InstallError("wheel", `there is no wheel in ${this.bundled}; set planpatch.serverPackage`);
    }
    const name = `env-${Date.now().toString(36)}`;
    const folder = path.join(this.root, name);
    mkdirSync(this.root, { recursive: true });
    try {
      await this.checkPython(options);
      options.progress("venv");
      await this.run(options.basePython, ["-I", "-m", "venv", folder], options.signal, "venv");
      await this.pip(pythonOf(folder, options.platform), requirement, options);
      const digest = options.requirement === null ? digestOf(requirement) : "";
      this.makeCurrent({ folder: name, requirement, digest });
    } catch (error) {
      rmSync(folder, { recursive: true, force: true, maxRetries: 3 });
      throw error;
    }
    this.removeOthers(name);
  }

  private async checkPython(options: InstallOptions): Promise<void> {
    const code = "import sys, venv, ensurepip; print('.'.join(map(str, sys.version_info[:3])))";
    const output = await this.run(options.basePython, ["-I", "-c", code], options.signal, "python");
    const numbers = output.trim().split(".").map(Number);
    const [major = 0, minor = 0] = numbers;
    if (major < OLDEST_PYTHON[0] || (major === OLDEST_PYTHON[0] && minor < OLDEST_PYTHON[1])) {
      throw new InstallError("python", `${options.basePython} is Python ${output.trim()}; 3.10 or newer is needed`);
    }
  }

  private async pip(python: string, requirement: string, options: InstallOptions): Promise<void> {
    const isOurs = options.requirement === null && existsSync(this.constraints());
    for (const step of pipSteps(requirement, options, isOurs ? this.constraints() : null)) {
      options.progress(step.title);
      try {
        const args = ["-I", "-m", "pip", "install", ...QUIET, ...step.args];
        await this.run(python, args, options.signal, "pip");
      } catch (error) {
        if (!step.mayFail || (error instanceof InstallError && error.reason === "cancelled")) {
          throw error;
        }
        this.log(`${String(error)}; the next step goes on without it`);
      }
    }
  }

  private makeCurrent(installed: Installed): void {
    const file = path.join(this.root, CURRENT);
    writeFileSync(`${file}.new`, JSON.stringify(installed));
    renameSync(`${file}.new`, file);
  }

  /** Earlier environments; one that a server still runs in stays until the next time. */
  private removeOthers(current: string): void {
    for (const name of readdirSync(this.root).filter((one) => one.startsWith("env-") && one !== current)) {
      try {
        rmSync(path.join(this.root, name), { recursive: true, force: true });
      } catch (error) {
        this.log(`${name} is still in use: ${String(error)}`);
      }
    }
  }

  private run(
    command: string,
    args: string[],
    signal: AbortSignal,
    reason: "python" | "venv" | "pip",
  ): Promise<string> {
    return new Promise((resolve, reject) => {
      if (signal.aborted) {
        reject(new InstallError("cancelled", "cancelled"));
        return;
      }
      this.log([command, ...args].join(" "));
      const child = spawn(command, args, { cwd: this.root, env: cleanEnvironment(process.env), windowsHide: true });
      const end = (): void => endTree(child);
      signal.addEventListener("abort", end, { once: true });
      let output = "";
      let errors = "";
      child.stdout.on("data", (data: Buffer) => {
        output += data.toString("utf8");
        this.logLines(data);
      });
      child.stderr.on("data", (data: Buffer) => {
        errors = (errors + data.toString("utf8")).slice(-4000);
        this.logLines(data);
      });
      child.once("error", (error) => reject(new InstallError(reason, `${command}: ${error.message}`)));
      child.once("close", (code) => {
        signal.removeEventListener("abort", end);
        if (signal.aborted) {
          reject(new InstallError("cancelled", "cancelled"));
        } else if (code === 0) {
          resolve(output);
        } else {
          reject(new InstallError(reason, lastLines(errors) || `${command} ended with code ${code ?? "unknown"}`));
        }
      });
    });
  }

  private logLines(data: Buffer): void {
    for (const line of data.toString("utf8").split(/\r?\n|\r/)) {
      if (line.trim() !== "") {
        this.log(line);
      }
    }
  }
}

/** What pip is asked for. torch comes first, from the index that has the build for this machine. */
export function pipSteps(
  requirement: string,
  options: Pick<InstallOptions, "pipArgs" | "hasNvidia" | "platform">,
  constraints: string | null = null,
): Step[] {
  const wanted = options.hasNvidia ? withExtra(requirement, "cuda") : requirement;
  const tested = constraints === null ? [] : ["--constraint", constraints];
  if (options.pipArgs !== null) {
    return [{ title: "planpatch", args: [wanted, ...tested, ...options.pipArgs], mayFail: false }];
  }
  const index = options.hasNvidia ? CUDA_INDEX : CPU_INDEX;
  const hasFit = options.platform === "darwin" || (options.platform === "linux" && options.hasNvidia);
  const isNeeded = !hasFit && !(options.platform === "win32" && !options.hasNvidia); // there PyPI's build is the right one
  return [
    ...(isNeeded ? [{ title: "torch", args: ["torch", "--index-url", index, ...FEW_TRIES], mayFail: !options.hasNvidia }] : []),
    { title: "planpatch", args: [wanted, ...tested], mayFail: false },
  ];
}

/** `planpatch==0.1.0` or a wheel's path with an extra. */
export function withExtra(requirement: string, extra: string): string {
  if (/\[[^\]]*\]/.test(path.basename(requirement))) {
    return requirement;
  }
  if (/\.whl$|\.tar\.gz$/.test(requirement) || /[\\/]/.test(requirement)) {
    return `${requirement}[${extra}]`;
  }
  return requirement.replace(/^[A-Za-z0-9._-]+/, (name) => `${name}[${extra}]`);
}

export function pythonOf(folder: string, platform: NodeJS.Platform): string {
  return platform === "win32" ? path.join(folder, "Scripts", "python.exe") : path.join(folder, "bin", "python");
}

/** Without what would lead pip or Python astray. */
export function cleanEnvironment(env: NodeJS.ProcessEnv): NodeJS.ProcessEnv {
  const dropped = new Set(["PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PIP_USER", "PIP_TARGET", "PIP_PREFIX"]);
  const kept = Object.entries(env).filter(([name]) => !dropped.has(name.toUpperCase()));
  return { ...Object.fromEntries(kept), PYTHONUTF8: "1", PIP_USER: "0" };
}

export function digestOf(file: string): string {
  return createHash("sha256").update(readFileSync(file)).digest("hex");
}

/** Whether the machine has an NVIDIA driver. */
export function hasNvidia(platform: NodeJS.Platform, env: NodeJS.ProcessEnv): boolean {
  const places =
    platform === "win32"
      ? [path.join(env.SystemRoot ?? "C:\\Windows", "System32", "nvidia-smi.exe")]
      : ["/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi"];
  return places.some((place) => existsSync(place) && statSync(place).isFile());
}

function endTree(child: ChildProcess): void {
  if (process.platform === "win32" && child.pid !== undefined) {
    spawn("taskkill", ["/pid", String(child.pid), "/t", "/f"], { windowsHide: true });
  } else {
    child.kill("SIGTERM");
  }
}

function lastLines(text: string): string {
  return text.trim().split(/\r?\n/).slice(-3).join("\n");
}
