// An exported agent in the browser: the OnnxAgent of sb3_cyborg.runtime in JavaScript.
import * as ort from "./vendor/ort.wasm.min.mjs";

// One thread: more need SharedArrayBuffer, which needs special headers (COOP and COEP) from the server.
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href;

const ARRAYS = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, bool: Uint8Array, uint8: Uint8Array };

export class OnnxAgent {
  // Loads the file of `sb3_cyborg.export.export_onnx`.
  static async load(url) {
    const agent = new OnnxAgent();
    agent.session = await ort.InferenceSession.create(url, { executionProviders: ["wasm"] });
    agent.inputs = Object.fromEntries(agent.session.inputMetadata.map((input) => [input.name, input]));
    return agent;
  }

  // An input for `rows` rows; its values, one number after the other, must fill it.
  tensor(name, values, rows) {
    const { type, shape } = this.inputs[name];
    const data = type === "int64" ? BigInt64Array.from(values, BigInt) : ARRAYS[type].from(values);
    return new ort.Tensor(type, data, [rows, ...shape.slice(1)]);
  }

  // A state of `rows` rows. Its values do not matter: `episodeStart` replaces them by the initial ones in the graph.
  emptyState(rows) {
    const state = {};
    for (const [name, { type, shape }] of Object.entries(this.inputs)) {
      if (!name.startsWith("state.")) continue;
      const size = shape.slice(1).reduce((product, length) => product * length, rows);
      state[name] = new ort.Tensor(type, new ARRAYS[type](size), [rows, ...shape.slice(1)]);
    }
    return state;
  }

  // One step of `rows` rows. `observations`: numbers, a row after the other; `episodeStarts`: a boolean for each row.
  // Returns the action of each row, logits and value as flat arrays, and the state for the next step.
  async step(observations, state, episodeStarts) {
    const rows = episodeStarts.length;
    const results = await this.session.run({
      observation: this.tensor("observation", observations, rows),
      episode_start: this.tensor("episode_start", episodeStarts, rows),
      ...(state ?? this.emptyState(rows)),
    });
    const next = {};
    for (const [name, tensor] of Object.entries(results)) {
      if (name.startsWith("next_state.")) next[name.slice("next_".length)] = tensor;
    }
    return {
      action: Array.from(results.action.data, Number),
      logits: Array.from(results.logits.data),
      value: Array.from(results.value.data),
      state: next,
    };
  }

  // A state whose rows are copies of the only row of `state`, each changed by the function of that name.
  static branches(state, changes) {
    const rows = {};
    for (const [name, tensor] of Object.entries(state)) {
      const size = tensor.data.length;
      const data = new tensor.data.constructor(size * changes.length);
      changes.forEach((change, row) => data.set(change[name]?.(tensor.data.slice()) ?? tensor.data, row * size));
      rows[name] = new ort.Tensor(tensor.type, data, [changes.length, ...tensor.dims.slice(1)]);
    }
    return rows;
  }
}
