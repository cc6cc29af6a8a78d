"use strict";
// Shows one episode: the chosen step, and charts over all steps. All text enters the page through `textContent`.

const data = JSON.parse(document.getElementById("data").textContent);
const MISSING = 255;
const COLOURS = ["#2563eb", "#c2410c", "#15803d", "#7c3aed", "#b91c1c", "#0e7490", "#a16207", "#475569"];
const RAMPS = {
  violet: ["#ffffff", "#c9b8f5", "#7c3aed", "#2e1065"],
  blue: ["#ffffff", "#a9cdf5", "#2563eb", "#172554"],
  green: ["#ffffff", "#a7dfb8", "#15803d", "#052e16"],
  red: ["#ffffff", "#f9b8a8", "#dc2626", "#450a0a"],
  age: ["#fde047", "#4ade80", "#0e7490", "#312e81"],
};
const ABSENT = [222, 227, 233];
const MOST_READ = 4;
const MOST_ACTIONS = 10;

const charts = [];
const strips = [];
let now = 0;
let timer = null;

// --- small helpers

function element(tag, className, parent, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function byId(id) {
  return document.getElementById(id);
}

function number(value) {
  if (value === null) return "not finite";
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(3)));
}

function numbers(values, most = 8) {
  const shown = values.slice(0, most).map(number).join(", ");
  return values.length > most ? `${shown}, … (${values.length} numbers)` : shown;
}

function rounded(value) {
  return value === null ? null : Number(value.toFixed(2));
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
}

// Width of a bar in its box.
function setWidth(bar, share) {
  bar.style.width = `${100 * share}%`;
}

function parseColour(text) {
  return [1, 3, 5].map((start) => parseInt(text.slice(start, start + 2), 16));
}

function ramp(name) {
  const stops = RAMPS[name].map(parseColour);
  return Array.from({ length: MISSING }, (_, byte) => {
    const place = (byte / (MISSING - 1)) * (stops.length - 1);
    const index = Math.min(Math.floor(place), stops.length - 2);
    return stops[index].map((low, channel) => Math.round(low + (stops[index + 1][channel] - low) * (place - index)));
  });
}

// --- the maps of a part: bytes by head, step and row, in proportion to the square root of the value, so that small values differ

function decode(map) {
  map.bytes = Uint8Array.from(atob(map.values), (letter) => letter.charCodeAt(0));
  delete map.values;
}

function byteAt(map, head, step, row) {
  return map.bytes[(head * data.steps + step) * map.rows + row];
}

// The value of a cell over the chosen heads, or null where nothing is stored.
function cell(map, choice, step, row) {
  const heads = map.heads === 1 ? [0] : choice === "mean" || choice === "max" ? [...Array(map.heads).keys()] : [Number(choice)];
  const bytes = heads.map((head) => byteAt(map, head, step, row)).filter((byte) => byte !== MISSING);
  if (!bytes.length) return null;
  const values = bytes.map((byte) => (byte / (MISSING - 1)) ** 2 * map.top);
  return choice === "max" ? Math.max(...values) : values.reduce((sum, value) => sum + value, 0) / values.length;
}

function reduced(values, choice) {
  if (choice === "mean") return values.reduce((sum, value) => sum + value, 0) / values.length;
  return choice === "max" ? Math.max(...values) : values[Number(choice)];
}

// --- numbers of a step

function numbersOf(step) {
  const lines = [`action ${numbers(data.actions[step])}, reward ${number(data.rewards[step])}`];
  if (data.values) lines.push(`value ${number(data.values[step])}`);
  if (data.observations) lines.push(`observation ${numbers(data.observations[step])}`);
  return lines;
}

// --- charts: a canvas over all steps, with a cursor at the chosen step and another one at the pointer

function addChart(parent, title, options) {
  const heading = element("h3", "", parent, title);
  if (options.note) element("p", "note", parent, options.note);
  const box = element("div", "chart", parent);
  const canvas = element("canvas", "", box);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", title);
  canvas.style.height = `${options.height}px`;
  const top = element("span", `axis ${options.topPlace ?? "top"}`, box, options.top);
  const bottom = element("span", "axis bottom", box, options.bottom);
  const cursor = element("div", "cursor", box);
  const ghost = element("div", "ghost", box);
  ghost.hidden = true;
  const chart = { ...options, heading, box, canvas, top, bottom, cursor, ghost };
  canvas.addEventListener("pointermove", (event) => hover(chart, event));
  canvas.addEventListener("pointerdown", (event) => hover(chart, event));
  canvas.addEventListener("pointerleave", endHover);
  canvas.addEventListener("click", (event) => show(placeOf(chart, event).step));
  charts.push(chart);
  return chart;
}

function placeOf(chart, event) {
  const area = chart.canvas.getBoundingClientRect();
  const within = (position, count) => Math.min(Math.max(Math.floor(position * count), 0), count - 1);
  return {
    step: within((event.clientX - area.left) / area.width, data.steps),
    row: within(1 - (event.clientY - area.top) / area.height, chart.rows || 1),
  };
}

function moveCursor(chart, line, step) {
  const gutter = chart.canvas.offsetLeft;
  line.style.left = `${gutter + ((step + 0.5) / data.steps) * chart.canvas.clientWidth}px`;
}

function hover(chart, event) {
  const { step, row } = placeOf(chart, event);
  for (const other of charts) {
    other.ghost.hidden = false;
    moveCursor(other, other.ghost, step);
  }
  const tip = byId("tip");
  tip.textContent = [`Step ${step}`, ...chart.describe(step, row), ...numbersOf(step)].join("\n");
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = event.clientX + 14 + width > innerWidth ? event.clientX - width - 14 : event.clientX + 14;
  const below = event.clientY + 14 + height > innerHeight ? event.clientY - height - 14 : event.clientY + 14;
  tip.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
  tip.style.top = `${Math.max(8, below)}px`;
}

function endHover() {
  byId("tip").hidden = true;
  for (const chart of charts) chart.ghost.hidden = true;
}

function redraw(chart) {
  const { canvas } = chart;
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * scale));
  canvas.height = Math.max(1, Math.round(chart.height * scale));
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  chart.draw(context, canvas.clientWidth, chart.height);
  moveCursor(chart, chart.cursor, now);
}

// --- a chart of lines, points or bars

function addLines(parent, title, names, values, options = {}) {
  const finite = values.flat().filter((value) => value !== null);
  let low = options.low ?? Math.min(...finite, options.bars ? 0 : Infinity);
  let high = options.high ?? Math.max(...finite, options.bars ? 0 : -Infinity);
  if (!finite.length) [low, high] = [0, 1];
  const ends = [low, high];
  if (low === high) [low, high] = [low - 1, high + 1];
  const margin = 5;
  const chart = addChart(parent, title, {
    height: options.height ?? 64,
    note: options.note,
    top: number(ends[1]),
    bottom: ends[0] === ends[1] ? "" : number(ends[0]),
    topPlace: ends[0] === ends[1] ? "middle" : "top",
    describe: (step) => (options.quiet ? [] : names.map((name, line) => `${name} ${number(values[step][line])}`)),
    draw(context, width, height) {
      const x = (step) => ((step + 0.5) / data.steps) * width;
      const y = (value) => margin + (1 - (value - low) / (high - low)) * (height - 2 * margin);
      if (low < 0 && high > 0) {
        context.fillStyle = "#cbd5e1";
        context.fillRect(0, y(0), width, 1);
      }
      names.forEach((_, line) => {
        context.fillStyle = context.strokeStyle = COLOURS[line % COLOURS.length];
        const known = values.map((row, step) => [step, row[line]]).filter(([, value]) => value !== null);
        if (options.bars) {
          const bar = Math.max(1, Math.min(7, (0.7 * width) / data.steps));
          for (const [step, value] of known) {
            context.fillStyle = value < 0 ? "#b91c1c" : "#15803d";
            if (value) context.fillRect(x(step) - bar / 2, Math.min(y(value), y(0)), bar, Math.max(1, Math.abs(y(value) - y(0))));
          }
        } else if (options.points) {
          const size = Math.max(2, Math.min(6, (0.8 * width) / data.steps));
          for (const [step, value] of known) context.fillRect(x(step) - size / 2, y(value) - size / 2, size, size);
        } else {
          context.lineWidth = 1.6;
          context.beginPath();
          known.forEach(([step, value], index) => context[index ? "lineTo" : "moveTo"](x(step), y(value)));
          context.stroke();
        }
      });
    },
  });
  if (names.length > 1) addLegend(parent, names);
  return chart;
}

function addLegend(parent, names) {
  const legend = element("div", "scale", parent);
  names.forEach((name, line) => {
    const entry = element("span", "", legend);
    element("i", "", entry).style.background = COLOURS[line % COLOURS.length];
    entry.append(name);
  });
}

// --- a chart of coloured cells

// A canvas with a pixel for each cell.
function paint(map, choice, colours) {
  const image = new ImageData(data.steps, map.rows);
  for (let step = 0; step < data.steps; step++) {
    for (let row = 0; row < map.rows; row++) {
      const value = cell(map, choice, step, row);
      const colour = value === null ? ABSENT : colours[Math.round(Math.sqrt(value / map.top) * (MISSING - 1))];
      image.data.set([...colour, 255], 4 * ((map.rows - 1 - row) * data.steps + step));
    }
  }
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [data.steps, map.rows];
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function addMap(parent, part, map) {
  decode(map);
  const colours = ramp(map.colours);
  const chart = addChart(parent, map.title, {
    height: map.height,
    note: map.note,
    rows: map.rows,
    top: map.row_names ? "" : String(map.first + map.rows - 1),
    bottom: map.row_names ? "" : String(map.first),
    describe: (step, row) => describeCell(part, map, step, row),
    draw(context, width, height) {
      if (map.paintedFor !== part.choice) {
        map.painted = paint(map, part.choice, colours);
        map.paintedFor = part.choice;
      }
      context.imageSmoothingEnabled = data.steps > width || map.rows > height;
      context.imageSmoothingQuality = "high"; // thin lines stay when many steps share a pixel
      context.drawImage(map.painted, 0, 0, width, height);
      if (map.group) {
        context.fillStyle = "#64748b";
        for (let row = map.group; row < map.rows; row += map.group) context.fillRect(0, height * (1 - row / map.rows), width, 1);
      }
    },
  });
  addScale(parent, map);
  return chart;
}

function rowName(map, row) {
  if (map.row_names) return map.row_names[row];
  if (map.kind === "attention") return `step ${row}`;
  if (map.kind === "age") return row ? `${row + 1} steps before` : "the step before";
  return `${map.kind} ${row + map.first}`;
}

function describeCell(part, map, step, row) {
  const value = cell(map, part.choice, step, row);
  const name = rowName(map, row);
  if (map.kind === "attention" && row >= step) return [`step ${row} is not past yet`];
  const held = part.held && map.kind === "slot" ? part.held[step][row] : -1;
  const where = held >= 0 ? `${name}, which holds step ${held}` : name;
  if (value === null) return [`${where}: ${map.kind === "slot" ? "empty" : "not stored"}`];
  return [`${map.quantity} of ${where}: ${map.share ? percent(value) : number(value)}`];
}

function addSteps(parent) {
  const steps = element("div", "steps", parent);
  for (const text of ["0", "step of the episode", String(data.steps - 1)]) element("span", "", steps, text);
}

function addScale(parent, map) {
  const scale = element("div", "scale", parent);
  const entry = element("span", "", scale, `${map.quantity}: 0`);
  const bar = element("i", "ramp", entry);
  bar.style.background = `linear-gradient(90deg, ${RAMPS[map.colours].join(", ")})`;
  const shown = (value) => (map.share ? percent(value) : number(value));
  entry.append(`${shown(map.top)}, middle ${shown(map.top / 4)}`);
  if (map.bytes.includes(MISSING)) {
    const absent = element("span", "", scale);
    element("i", "", absent).style.background = `rgb(${ABSENT.join(",")})`;
    absent.append(map.absent);
  }
}

// --- the parts: each layer of the encoder with attention, and the memory

function addPart(parent, part) {
  const card = element("div", "card", parent);
  const head = element("div", "head", card);
  element("h2", "", head, part.name);
  part.choice = "mean";
  if (part.heads > 1) addHeadChoice(head, part);
  element("p", "note", card, part.note);
  const attention = part.maps.find((map) => map.kind === "attention");
  if (attention) {
    const strip = element("div", "reads", card);
    strips.push((step) => showReads(strip, part, attention, step));
  }
  const first = charts.length;
  for (const map of part.maps) addMap(card, part, map);
  const nulls = part.null_shares.map((shares) => [reduced(shares, part.choice)]);
  addLines(card, "Share of the read that is the learned null vector", ["null vector"], nulls, { low: 0, high: 1 });
  part.chooseNulls = () => nulls.forEach((row, step) => (row[0] = reduced(part.null_shares[step], part.choice)));
  if (part.gates) addLines(card, "Write gates", part.gate_names, part.gates, { low: 0, high: 1, height: 76 });
  addSteps(card);
  part.charts = charts.slice(first);
}

function addHeadChoice(parent, part) {
  const label = element("label", "", parent, "Heads ");
  const select = element("select", "", label);
  for (const name of ["mean", "max", ...Array(part.heads).keys()]) {
    element("option", "", select, typeof name === "number" ? `head ${name}` : name).value = name;
  }
  select.addEventListener("change", () => {
    part.choice = select.value;
    part.chooseNulls();
    part.charts.forEach(redraw);
    show(now);
  });
}

function showReads(strip, part, map, step) {
  const shares = [...Array(step).keys()].map((past) => [past, cell(map, part.choice, step, past) ?? 0]);
  const most = shares.filter(([, share]) => share >= 0.01).sort((a, b) => b[1] - a[1]).slice(0, MOST_READ);
  strip.replaceChildren();
  for (const [past, share] of most) {
    const button = element("button", "read", strip);
    button.type = "button";
    if (data.frames) addFrame(button, past);
    element("b", "", button, `step ${past}: ${percent(share)}`);
    if (data.observations) element("span", "", button, `saw ${numbers(data.observations[past].slice(0, 4).map(rounded))}`);
    setWidth(element("i", "", button), share);
    button.addEventListener("click", () => show(past));
  }
  const empty = element("div", "read none", strip);
  element("b", "", empty, `null vector: ${percent(reduced(part.null_shares[step], part.choice))}`);
  element("span", "", empty, most.length ? "no entry" : "no entry is read");
}

function addFrame(parent, step) {
  const image = element("img", data.pixelated ? "pixels" : "", parent);
  image.src = data.frames[data.frame_of[step]];
  image.alt = `Frame of step ${step}`;
  return image;
}

// --- the chosen step

function showNow(step) {
  const card = byId("now").firstElementChild;
  card.replaceChildren();
  if (data.frames) addFrame(card, step).id = "frame";
  const list = element("dl", "", card);
  const entry = (name, text) => {
    element("dt", "", list, name);
    element("dd", "", list, text);
  };
  entry("step", String(step));
  if (data.observations) entry("observation", numbers(data.observations[step]));
  entry("action", numbers(data.actions[step]));
  if (data.values) entry("value", number(data.values[step]));
  entry("reward", number(data.rewards[step]));
  entry("return so far", number(data.rewards.slice(0, step + 1).reduce((sum, reward) => sum + (reward ?? 0), 0)));
  if (data.probabilities) showProbabilities(card, step);
}

function showProbabilities(card, step) {
  element("h3", "", card, "Probabilities of the actions");
  const odds = element("div", "odds", card);
  const likeliest = data.probabilities[step].map((share, action) => [action, share]);
  if (likeliest.length > MOST_ACTIONS) likeliest.sort((a, b) => b[1] - a[1]).splice(MOST_ACTIONS);
  for (const [action, share] of likeliest) {
    const taken = action === data.actions[step][0] ? "taken" : "";
    element("span", taken, odds, String(action));
    setWidth(element("i", taken, element("div", "", odds)), share);
    element("span", `number ${taken}`, odds, percent(share));
  }
}

function show(step) {
  now = Math.min(Math.max(step, 0), data.steps - 1);
  byId("slider").value = now;
  byId("counter").textContent = `step ${now} / ${data.steps - 1}`;
  showNow(now);
  for (const strip of strips) strip(now);
  for (const chart of charts) moveCursor(chart, chart.cursor, now);
}

// --- playing, keys, start

function play() {
  if (timer !== null) return stop();
  if (now === data.steps - 1) show(0);
  byId("play").textContent = "Pause";
  timer = setInterval(() => (now < data.steps - 1 ? show(now + 1) : stop()), Math.min(400, Math.max(60, 20000 / data.steps)));
}

function stop() {
  clearInterval(timer);
  timer = null;
  byId("play").textContent = "Play";
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT") return;
  const steps = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: data.steps - 1 };
  if (event.key in steps) {
    event.preventDefault(); // the slider would move as well
    show(steps[event.key]);
  } else if (event.key === " " && event.target.tagName !== "BUTTON") {
    event.preventDefault();
    play();
  }
}

function addEpisode(parent) {
  const card = element("div", "card", parent);
  element("h2", "", card, "Episode");
  if (data.values) addLines(card, "Value, the return that the agent expects from here on", ["value"], data.values.map((value) => [value]), { quiet: true });
  const names = (word, rows) => rows[0].map((_, index) => (rows[0].length > 1 ? `${word} ${index}` : word));
  addLines(card, "Action", names("action", data.actions), data.actions, { points: data.discrete_actions, quiet: true });
  addLines(card, "Reward", ["reward"], data.rewards.map((reward) => [reward]), { bars: true, quiet: true });
  if (data.observation_map) addMap(card, { choice: "mean" }, data.observation_map);
  else if (data.observations) {
    addLines(card, "Observation", names("observation", data.observations), data.observations, { points: data.discrete_observations, quiet: true });
  }
  addSteps(card);
}

byId("title").textContent = data.title;
byId("summary").textContent = data.summary;
byId("slider").max = data.steps - 1;
byId("slider").addEventListener("input", (event) => show(Number(event.target.value)));
byId("play").addEventListener("click", play);
document.addEventListener("keydown", onKey);
element("div", "card", byId("now"));
for (const part of data.parts) addPart(byId("charts"), part);
addEpisode(byId("charts"));
new ResizeObserver(() => charts.forEach(redraw)).observe(byId("charts"));
charts.forEach(redraw);
show(0);
