// Copies the files of onnxruntime-web that the page loads into vendor/, so that it needs no other server.
import { copyFileSync, mkdirSync } from "node:fs";

const from = new URL("node_modules/onnxruntime-web/dist/", import.meta.url);
const to = new URL("vendor/", import.meta.url);
mkdirSync(to, { recursive: true });
// The WebAssembly build for CPUs: the loader, its glue code, and the binary, which also runs with one thread.
for (const name of ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]) {
  copyFileSync(new URL(name, from), new URL(name, to));
}
