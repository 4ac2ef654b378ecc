import { execFileSync } from "node:child_process";
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { cleanEnvironment, CPU_INDEX, CUDA_INDEX, InstallError, type InstallOptions, pipSteps, PrivateEnvironment, withExtra } from "../../src/environment";

let storage: string;
let log: string[];

beforeEach(() => {
  storage = mkdtempSync(path.join(tmpdir(), "planpatch ext 🙂 "));
  log = [];
});
afterEach(() => rmSync(storage, { recursive: true, force: true }));

function environment(): PrivateEnvironment {
  return new PrivateEnvironment(storage, path.join(storage, "bundled"), (line) => log.push(line));
}

function options(more: Partial<InstallOptions> = {}): InstallOptions {
  return {
    basePython: findPython(),
    requirement: null,
    pipArgs: ["--no-index", "--no-deps"],
    hasNvidia: false,
    platform: process.platform,
    progress: () => undefined,
    signal: new AbortController().signal,
    ...more,
  };
}

function findPython(): string {
  return execFileSync("python3", ["-I", "-c", "import sys; print(sys.executable)"], { encoding: "utf8" }).trim();
}

/** Makes environments as Python does, but for pip: that takes ten seconds, and here it is to fail. */
function pythonWhosePipFails(): string {
  const file = path.join(storage, "python-without-index");
  const pip = "#!/bin/sh\\necho ERROR: No matching distribution >&2\\nexit 1\\n";
  writeFileSync(
    file,
    `#!/bin/sh\nif [ "$3" = venv ]; then mkdir -p "$4/bin"; printf '${pip}' > "$4/bin/python"; chmod +x "$4/bin/python"; else echo 3.12.1; fi\n`,
  );
  chmodSync(file, 0o755);
  return file;
}

/** A wheel of one module, made with Python's own zipfile. */
function bundleWheel(body: string): void {
  const folder = path.join(storage, "bundled");
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder);
  const script = `
import sys, zipfile
meta = "Metadata-Version: 2.1\\nName: planpatch\\nVersion: 0.1.0\\n"
kind = "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
with zipfile.ZipFile(sys.argv[1], "w") as wheel:
    wheel.writestr("lsp_server.py", sys.argv[2])
    wheel.writestr("planpatch-0.1.0.dist-info/METADATA", meta)
    wheel.writestr("planpatch-0.1.0.dist-info/WHEEL", kind)
    wheel.writestr("planpatch-0.1.0.dist-info/RECORD", "")
`;
  execFileSync(findPython(), ["-I", "-c", script, path.join(folder, "planpatch-0.1.0-py3-none-any.whl"), body]);
}

describe("with a real Python and pip", { timeout: 120_000 }, () => {
  test("an environment is made, used, found outdated, and survives an install that fails or is cancelled", async () => {
    bundleWheel("print('one')");
    const made = environment();
    expect(made.python()).toBeNull();
    const steps: string[] = [];
    await made.install(options({ progress: (step) => steps.push(step) }));
    expect(steps).toEqual(["venv", "planpatch"]);
    const python = made.python() as string;
    expect(execFileSync(python, ["-I", "-m", "lsp_server"], { encoding: "utf8" }).trim()).toBe("one");
    expect(made.isOutdated()).toBe(false);

    bundleWheel("print('two')");
    expect(made.isOutdated()).toBe(true);
    await expect(made.install(options({ basePython: pythonWhosePipFails() }))).rejects.toThrow("No matching distribution");
    const abort = new AbortController();
    const cancelled = made.install(options({ signal: abort.signal, progress: () => abort.abort() }));
    await expect(cancelled).rejects.toMatchObject({ reason: "cancelled" });
    expect(made.python()).toBe(python);
    expect(readdirSync(path.join(storage, "environments"))).toHaveLength(2); // the environment and current.json
    expect(log).toContain("ERROR: No matching distribution");
  });
});

describe("a Python that cannot be used", () => {
  test.skipIf(process.platform === "win32")("is told with what it said, and nothing is left behind", async () => {
    bundleWheel("");
    const old = path.join(storage, "old-python");
    writeFileSync(old, "#!/bin/sh\necho 3.9.18\n");
    chmodSync(old, 0o755);
    const made = environment();
    await expect(made.install(options({ basePython: old }))).rejects.toThrow("is Python 3.9.18; 3.10 or newer is needed");
    writeFileSync(old, "#!/bin/sh\necho 'No module named ensurepip' >&2; exit 1\n");
    await expect(made.install(options({ basePython: old }))).rejects.toThrow("No module named ensurepip");
    await expect(made.install(options({ basePython: "/no/such/python" }))).rejects.toMatchObject({ reason: "python" });
    expect(readdirSync(path.join(storage, "environments"))).toEqual([]);
  });

  test("without a wheel and a setting there is nothing to install", async () => {
    await expect(environment().install(options())).rejects.toThrow(InstallError);
  });
});

describe("the file that names the environment", () => {
  test.each([
    ["is not there", null],
    ["is no JSON", "{"],
    ["names a folder elsewhere", '{"folder": "../../evil", "requirement": "", "digest": ""}'],
    ["lacks the folder", '{"requirement": "", "digest": ""}'],
    ["names a folder that is gone", '{"folder": "env-1", "requirement": "", "digest": ""}'],
  ])("that %s names none", (_, text) => {
    mkdirSync(path.join(storage, "environments"));
    if (text !== null) {
      writeFileSync(path.join(storage, "environments", "current.json"), text);
    }
    expect(environment().python()).toBeNull();
    expect(existsSync(storage)).toBe(true);
  });
});

describe("what pip is asked for", () => {
  const steps = (more: Partial<InstallOptions>): string[] =>
    pipSteps("/x/planpatch.whl", { pipArgs: null, hasNvidia: false, platform: "linux", ...more }).map((step) => step.args.join(" "));

  test.each<[string, Partial<InstallOptions>, string[]]>([
    ["Linux, no GPU: the small torch", {}, [`torch --index-url ${CPU_INDEX} --retries 2 --timeout 20`, "/x/planpatch.whl"]],
    ["Linux, NVIDIA: PyPI's torch has CUDA", { hasNvidia: true }, ["/x/planpatch.whl[cuda]"]],
    ["Windows, no GPU: PyPI's torch", { platform: "win32" }, ["/x/planpatch.whl"]],
    ["Windows, NVIDIA: PyTorch's own index", { platform: "win32", hasNvidia: true }, [`torch --index-url ${CUDA_INDEX} --retries 2 --timeout 20`, "/x/planpatch.whl[cuda]"]],
    ["a Mac", { platform: "darwin" }, ["/x/planpatch.whl"]],
    ["the user's own arguments", { pipArgs: ["--pre"], hasNvidia: true }, ["/x/planpatch.whl[cuda] --pre"]],
  ])("%s", (_, more, args) => {
    expect(steps(more)).toEqual(args);
  });

  test("the versions that were tested, but for torch's own index", () => {
    const args = pipSteps("p", { pipArgs: null, hasNvidia: false, platform: "linux" }, "/c.txt").map((step) => step.args);
    expect(args.map((one) => one.includes("--constraint"))).toEqual([false, true]);
    expect(args[1]).toEqual(["p", "--constraint", "/c.txt"]);
  });

  test("the small torch is a favour; the one with CUDA is what the user needs", () => {
    const first = (hasNvidia: boolean): boolean | undefined =>
      pipSteps("p", { pipArgs: null, hasNvidia, platform: hasNvidia ? "win32" : "linux" })[0]?.mayFail;
    expect([first(false), first(true)]).toEqual([true, false]);
  });

  test.each([
    ["planpatch==0.1.0", "planpatch[cuda]==0.1.0"],
    ["planpatch", "planpatch[cuda]"],
    ["planpatch[plot]", "planpatch[plot]"],
    ["C:\\w\\planpatch-0.1.0-py3-none-any.whl", "C:\\w\\planpatch-0.1.0-py3-none-any.whl[cuda]"],
  ])("%s with an extra is %s", (requirement, wanted) => {
    expect(withExtra(requirement, "cuda")).toBe(wanted);
  });
});

test("what would lead Python or pip astray is kept from them, whatever its case", () => {
  const env = { PYTHONPATH: "/ws", PythonHome: "/ws", PIP_TARGET: "/ws", PATH: "/bin", PIP_INDEX_URL: "https://example.org" };
  expect(cleanEnvironment(env)).toEqual({ PATH: "/bin", PIP_INDEX_URL: "https://example.org", PYTHONUTF8: "1", PIP_USER: "0" });
});
