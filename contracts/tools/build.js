#!/usr/bin/env node
// Compiles src/ with solc-js into the artifacts that the Python package ships: ABI and bytecode, and the digest of the
// sources that they come from. `node tools/build.js FOLDER`; the same sources and settings give the same bytes.
"use strict";

const crypto = require("crypto");
const fs = require("fs");
const path = require("path");
const solc = require("solc");

const root = path.resolve(__dirname, "..");
const folder = process.argv[2];
if (!folder) throw new Error("where to? node tools/build.js FOLDER");

const names = fs.readdirSync(path.join(root, "src")).filter((name) => name.endsWith(".sol")).sort();
const sources = Object.fromEntries(
  names.map((name) => [`src/${name}`, { content: fs.readFileSync(path.join(root, "src", name), "utf8") }]),
);
const settings = {
  // As foundry.toml says, so that what is tested is what is shipped.
  optimizer: { enabled: true, runs: 1000000 },
  evmVersion: "cancun",
  metadata: { appendCBOR: false, bytecodeHash: "none" },
  outputSelection: { "*": { "*": ["abi", "evm.bytecode.object"] } },
};

const find = (wanted) => ({ contents: fs.readFileSync(path.join(root, "node_modules", wanted), "utf8") });
const output = JSON.parse(
  solc.compile(JSON.stringify({ language: "Solidity", sources, settings }), { import: find }),
);
for (const error of output.errors ?? []) console.error(error.formattedMessage);
if ((output.errors ?? []).length > 0) process.exit(1);

const digest = crypto.createHash("sha256");
for (const name of names) digest.update(`${name}\n${sources[`src/${name}`].content}\n`);

for (const [file, contracts] of Object.entries(output.contracts)) {
  for (const [name, contract] of Object.entries(contracts)) {
    if (file !== `src/${name}.sol` || contract.evm.bytecode.object === "") continue;
    const artifact = {
      contract: name,
      compiler: solc.version(),
      sources: digest.copy().digest("hex"),
      abi: contract.abi,
      bytecode: `0x${contract.evm.bytecode.object}`,
    };
    fs.writeFileSync(path.join(folder, `${name}.json`), `${JSON.stringify(artifact, null, 2)}\n`);
  }
}
