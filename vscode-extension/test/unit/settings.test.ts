import { readFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, test } from "vitest";
import { needsRestart, OWN_SETTINGS, ownSettings, RESTART_SETTINGS, serverSection } from "../../src/settings";

interface Property {
  default?: unknown;
  scope?: string;
  markdownDescription?: string;
  type?: string | string[];
}

const manifest = JSON.parse(readFileSync(path.join(__dirname, "../../package.json"), "utf8")) as {
  contributes: { configuration: { properties: Record<string, Property> }[] };
  capabilities: { untrustedWorkspaces: { supported: string; restrictedConfigurations: string[] } };
};
const properties = Object.assign({}, ...manifest.contributes.configuration.map((group) => group.properties)) as Record<
  string,
  Property
>;
const defaults = Object.fromEntries(
  Object.entries(properties).map(([name, property]) => [name.replace("planpatch.", ""), property.default]),
);

describe("package.json", () => {
  test("every setting is not set by default, and null may be written", () => {
    for (const [name, { default: value, type }] of Object.entries(properties)) {
      expect(value, name).toBeNull();
      expect(type, name).toContain("null");
    }
  });

  test("every setting has a description in the user's language and a place in the list of the restricted", () => {
    expect(Object.values(properties).every((one) => /^%setting\.\w+%$/.test(one.markdownDescription ?? ""))).toBe(true);
    expect(manifest.capabilities.untrustedWorkspaces.supported).toBe("limited");
    expect(manifest.capabilities.untrustedWorkspaces.restrictedConfigurations.sort()).toEqual(
      Object.keys(properties).sort(),
    );
  });

  test("a workspace sets style, presets and context alone", () => {
    const open = Object.keys(properties).filter((name) => properties[name]?.scope !== "machine");
    expect(open.sort()).toEqual(["contextTokens", "presets", "style", "surroundingsChars"].map((one) => `planpatch.${one}`));
    expect(new Set(open.map((name) => properties[name]?.scope))).toEqual(new Set(["window"]));
  });

  test("the extension's own settings are all there", () => {
    for (const name of OWN_SETTINGS) {
      expect(properties, name).toHaveProperty([`planpatch.${name}`]);
    }
  });
});

test("with the defaults the server is told nothing, so that its own sources count", () => {
  expect(serverSection(defaults)).toEqual({});
});

test("the server is told what is set, and nothing that is the extension's", () => {
  const section = { ...defaults, model: "qwen3-8b", serverPath: "/x", review: "inline", http: false, planMaxNewTokens: 32 };
  expect(serverSection(section)).toEqual({ model: "qwen3-8b", http: false, planMaxNewTokens: 32 });
});

test("with the defaults the extension shows diffs and remembers 50 requests", () => {
  expect(ownSettings(defaults)).toEqual({
    serverPath: null,
    serverArgs: null,
    serverPackage: null,
    serverPipArgs: null,
    basePython: null,
    useInterpreter: false,
    home: null,
    review: "diff",
    historySize: 50,
  });
});

test.each([
  ["serverPath", "  /usr/bin/planpatch ", "/usr/bin/planpatch"],
  ["serverPath", "", null],
  ["serverPath", 7, null],
  ["serverArgs", ["-I"], ["-I"]],
  ["serverArgs", ["-I", 3], null],
  ["useInterpreter", "yes", false],
  ["useInterpreter", true, true],
  ["review", "preview", "preview"],
  ["review", "loud", "diff"],
  ["historySize", 0, 0],
  ["historySize", -1, 50],
  ["historySize", 2.5, 50],
  ["historySize", 501, 50],
])("%s set to %o counts as %o", (name, value, counts) => {
  expect(ownSettings({ ...defaults, [name]: value })[name as keyof ReturnType<typeof ownSettings>]).toEqual(counts);
});

test("a running server is started anew for these settings and no others", () => {
  const before = ownSettings(defaults);
  const changed: Record<(typeof OWN_SETTINGS)[number], unknown> = {
    serverPath: "/a",
    serverArgs: ["-I"],
    serverPackage: "planpatch==0.1.1",
    serverPipArgs: ["--pre"],
    basePython: "/usr/bin/python3",
    useInterpreter: true,
    home: "/h",
    review: "inline",
    historySize: 3,
  };
  const restarting = OWN_SETTINGS.filter((name) =>
    needsRestart(before, ownSettings({ ...defaults, [name]: changed[name] })),
  );
  expect(restarting).toEqual([...RESTART_SETTINGS]);
  expect(needsRestart(before, ownSettings(defaults))).toBe(false);
});
