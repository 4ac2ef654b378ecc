import { describe, expect, test } from "vitest";
import {
  compareVersions,
  findBasePython,
  findOnPath,
  findServer,
  isCompatible,
  ISOLATED,
  type Machine,
  NotFoundError,
  type Wanted,
} from "../../src/discovery";
import { SERVER_VERSIONS } from "../../src/protocol";

const NOTHING: Wanted = { serverPath: null, serverArgs: null, environmentPython: null, interpreter: null, workspaces: [] };

function linux(files: string[], PATH = "/usr/bin"): Machine {
  return { platform: "linux", env: { PATH }, home: "/home/me", isFile: (file) => files.includes(file) };
}

function windows(files: string[], Path = "C:\\Tools"): Machine {
  const known = files.map((file) => file.toLowerCase());
  return { platform: "win32", env: { Path }, home: "C:\\Users\\me", isFile: (file) => known.includes(file.toLowerCase()) };
}

describe("the server is found in this order", () => {
  const files = ["/opt/planpatch", "/storage/bin/python", "/usr/bin/planpatch", "/ws/.venv/bin/python"];
  const all: Wanted = {
    ...NOTHING,
    serverPath: "/opt/planpatch",
    environmentPython: "/storage/bin/python",
    interpreter: "/ws/.venv/bin/python",
  };

  test.each([
    ["the setting", all, { source: "setting", command: "/opt/planpatch", args: [] }],
    [
      "the extension's own environment",
      { ...all, serverPath: null },
      { source: "environment", command: "/storage/bin/python", args: ISOLATED },
    ],
    [
      "planpatch on PATH",
      { ...all, serverPath: null, environmentPython: null },
      { source: "path", command: "/usr/bin/planpatch", args: [] },
    ],
  ])("%s", (_, wanted, launch) => {
    expect(findServer(wanted, linux(files))).toEqual(launch);
  });

  test("the workspace's interpreter, when it was chosen and nothing else is there", () => {
    const wanted = { ...NOTHING, interpreter: "/ws/.venv/bin/python" };
    expect(findServer(wanted, linux(files, "/nowhere"))).toEqual({
      source: "interpreter",
      command: "/ws/.venv/bin/python",
      args: ISOLATED,
    });
  });

  test("nothing at all is told apart from a bad setting", () => {
    const reason = (wanted: Wanted): string => {
      try {
        findServer(wanted, linux([]));
      } catch (error) {
        return error instanceof NotFoundError ? error.reason : "another error";
      }
      return "found";
    };
    expect(reason(NOTHING)).toBe("nowhere");
    expect(reason({ ...NOTHING, interpreter: "/ws/gone/python" })).toBe("nowhere");
    expect(reason({ ...NOTHING, serverPath: "/gone/planpatch" })).toBe("setting");
    expect(reason({ ...NOTHING, serverPath: "planpatch" })).toBe("setting");
  });

  test("a setting that is wrong is not passed over in silence", () => {
    const wanted = { ...all, serverPath: "./planpatch" };
    expect(() => findServer(wanted, linux(files))).toThrow('planpatch.serverPath is "./planpatch", which is no absolute path');
  });
});

describe("what the setting may name", () => {
  test.each([
    ["/usr/bin/python3.12", ISOLATED],
    ["/opt/PyPy3", ISOLATED],
    ["/opt/planpatch", []],
    ["/opt/python-wrapper", []],
  ])("%s", (serverPath, args) => {
    expect(findServer({ ...NOTHING, serverPath }, linux([serverPath])).args).toEqual(args);
  });

  test("~ is the user's folder", () => {
    const launch = findServer({ ...NOTHING, serverPath: "~/bin/planpatch" }, linux(["/home/me/bin/planpatch"]));
    expect(launch.command).toBe("/home/me/bin/planpatch");
  });

  test("arguments of the user's replace ours", () => {
    const launch = findServer(
      { ...NOTHING, serverPath: "/usr/bin/python3", serverArgs: ["-I", "wrapper.py"] },
      linux(["/usr/bin/python3"]),
    );
    expect(launch.args).toEqual(["-I", "wrapper.py"]);
  });
});

describe("PATH", () => {
  test("a folder of the workspace, a relative one and the current one are passed over", () => {
    const files = ["/ws/bin/planpatch", "/ws/planpatch", "bin/planpatch", "/usr/bin/planpatch"];
    const machine = linux(files, "/ws/bin:/ws:.:bin::/usr/bin");
    expect(findOnPath("planpatch", machine, ["/ws"])).toBe("/usr/bin/planpatch");
    expect(findOnPath("planpatch", linux(files, "/ws/bin:."), ["/ws"])).toBeNull();
  });

  test("a folder whose name only begins like the workspace's is none of it", () => {
    expect(findOnPath("planpatch", linux(["/ws2/planpatch"], "/ws2"), ["/ws"])).toBe("/ws2/planpatch");
  });

  test("a machine without PATH has nothing on it", () => {
    expect(findOnPath("planpatch", { ...linux([]), env: {} }, [])).toBeNull();
  });

  test("Windows: the variable's case, quotes, extensions and the workspace's case do not matter", () => {
    const machine = windows(["C:\\My Tools\\planpatch.cmd", "D:\\WS\\planpatch.exe"], '"C:\\My Tools";d:\\ws');
    expect(findOnPath("planpatch", machine, ["D:\\WS"])).toBe("C:\\My Tools\\planpatch.cmd");
  });
});

test.each([
  [["C:\\Tools\\planpatch.cmd", "C:\\Tools\\python.exe"], "C:\\Tools\\python.exe"],
  [["C:\\Tools\\planpatch.cmd", "C:\\python.exe"], "C:\\python.exe"],
])("Windows: the Python beside the launcher is started, for Node starts no .cmd: %s", (files, command) => {
  expect(findServer(NOTHING, windows(files))).toEqual({ source: "path", command, args: ISOLATED });
});

describe("the Python to make an environment with", () => {
  test("the setting counts alone", () => {
    expect(findBasePython("/opt/python", linux(["/opt/python", "/usr/bin/python3"]), [])).toBe("/opt/python");
    expect(findBasePython("/gone/python", linux(["/usr/bin/python3"]), [])).toBeNull();
  });

  test("else the first on PATH, but neither the workspace's nor Windows' stub", () => {
    expect(findBasePython(null, linux(["/ws/python3", "/usr/bin/python3.12"], "/ws:/usr/bin"), ["/ws"])).toBe(
      "/usr/bin/python3.12",
    );
    const stub = "C:\\Users\\me\\AppData\\Local\\Microsoft\\WindowsApps";
    expect(findBasePython(null, windows([`${stub}\\python3.exe`], stub), [])).toBeNull();
    expect(findBasePython(null, windows(["C:\\Windows\\py.exe"], "C:\\Windows"), [])).toBe("C:\\Windows\\py.exe");
  });
});

test.each([
  ["0.1.0", "0.1.0", 0],
  ["0.1.10", "0.1.9", 1],
  ["0.2.0rc1", "0.2.0", 0],
  ["1.0", "1.0.0", 0],
  ["0.9.9", "1", -1],
])("%s compared with %s", (left, right, order) => {
  expect(compareVersions(left, right)).toBe(order);
});

test("a server of another series, or one that says no version, is not talked to", () => {
  const range = { atLeast: "0.1.0", below: "0.2.0" };
  expect(["0.1.0", "0.1.7", "0.1.0.dev3"].every((version) => isCompatible(version, range))).toBe(true);
  expect(["0.0.9", "0.2.0", "1.1.0", "", "unknown"].some((version) => isCompatible(version, range))).toBe(false);
  expect(SERVER_VERSIONS).toEqual(range);
});
