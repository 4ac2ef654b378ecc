// Bundles the extension into out/extension.js; `--watch` goes on doing so, `--production` makes it small.

import { existsSync, readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import * as esbuild from "esbuild";

const production = process.argv.includes("--production");
const options = {
  entryPoints: ["src/extension.ts"],
  bundle: true,
  outfile: "out/extension.js",
  platform: "node",
  format: "cjs",
  target: "node20",
  external: ["vscode"],
  minify: production,
  sourcemap: !production,
  legalComments: "none",
  logLevel: "info",
};

if (process.argv.includes("--watch")) {
  await (await esbuild.context(options)).watch();
} else {
  const { metafile } = await esbuild.build({ ...options, metafile: true });
  writeFileSync("out/THIRD-PARTY-NOTICES.txt", notices(Object.keys(metafile.inputs)));
}

/** The licences of the packages whose code is in the bundle: each asks that its text goes with it. */
function notices(inputs) {
  const packages = new Set(inputs.flatMap((file) => /^(node_modules\/(?:@[^/]+\/)?[^/]+)/.exec(file)?.[1] ?? []));
  return [...packages].sort().map(noticeOf).join("\n\n");
}

function noticeOf(folder) {
  const { name, version, license } = JSON.parse(readFileSync(path.join(folder, "package.json"), "utf8"));
  const names = ["LICENSE", "LICENSE.md", "LICENSE.txt", "License.txt", "license"];
  const file = names.map((one) => path.join(folder, one)).find((one) => existsSync(one));
  if (file === undefined) {
    throw new Error(`${name} ${version} (${license}) has no licence file in ${folder}`);
  }
  return `${name} ${version} (${license})\n\n${readFileSync(file, "utf8").trim()}`;
}
