// `npm run package`: the server's wheel, the bundle, and one .vsix of both. Reaches no network.

import { execFileSync } from "node:child_process";
import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";

const here = path.dirname(fileURLToPath(import.meta.url));
const root = path.dirname(here);
const LARGEST_BYTES = 1_000_000;
const WHEEL_IS_OF = ["engine", "lsp_server", "training", "scripts", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"];

const vsix = path.join(here, "planpatch.vsix");
buildWheel(path.join(here, "server"));
run(process.execPath, [path.join(here, "esbuild.mjs"), "--production"], here);
const vsce = path.join(here, "node_modules", "@vscode", "vsce", "vsce");
run(process.execPath, [vsce, "package", "--no-dependencies", "--allow-missing-repository", "--out", vsix], here);
const bytes = statSync(vsix).size;
if (bytes >= LARGEST_BYTES) {
  throw new Error(`${vsix} has ${bytes} bytes; at most ${LARGEST_BYTES} are allowed`);
}
console.log(`${path.relative(process.cwd(), vsix)}: ${(bytes / 1000).toFixed(0)} kB`);

/**
 * The wheel that the extension installs into its own environment, made with the Python that has hatchling. The adapters
 * that ship with PlanPatch are megabytes and stay out: without their files the base model is used.
 */
function buildWheel(folder) {
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  const source = mkdtempSync(path.join(tmpdir(), "planpatch-wheel-"));
  const shipped = path.join("engine", "inference", "shipped");
  const isWanted = (from) => !from.endsWith(shipped) && !from.endsWith("__pycache__");
  for (const name of WHEEL_IS_OF) {
    cpSync(path.join(root, name), path.join(source, name), { recursive: true, filter: isWanted });
  }
  run(pythonWithHatchling(), ["-I", "-m", "hatchling", "build", "-t", "wheel", "-d", folder], source);
  rmSync(source, { recursive: true, force: true });
  const wheels = readdirSync(folder).filter((name) => name.endsWith(".whl"));
  if (wheels.length !== 1) {
    throw new Error(`hatchling left ${wheels.length} wheels in ${folder}`);
  }
  // The tested versions go with it. Not torch's: which build fits is a matter of the machine.
  const lines = readFileSync(path.join(root, "constraints.txt"), "utf8").split("\n");
  writeFileSync(path.join(folder, "constraints.txt"), lines.filter((line) => !/^torch\b/.test(line)).join("\n"));
}

function pythonWithHatchling() {
  const beside = process.platform === "win32" ? "Scripts\\python.exe" : "bin/python";
  const candidates = [process.env.PLANPATCH_PYTHON, path.join(root, ".venv", beside), "python3", "python"];
  for (const python of candidates) {
    if (!python || (path.isAbsolute(python) && !existsSync(python))) {
      continue;
    }
    try {
      execFileSync(python, ["-I", "-c", "import hatchling.build"], { stdio: "ignore" });
      return python;
    } catch {
      continue;
    }
  }
  throw new Error("no Python with hatchling: run `python run.py check` once, or set PLANPATCH_PYTHON to one that has it");
}

function run(command, args, cwd) {
  execFileSync(command, args, { cwd, stdio: "inherit" });
}
