// The page: the visitor and the agent name the same suits, and the memory of the agent is shown.
import { OnnxAgent } from "./agent.js";
import { RepeatPrevious, SUITS, SUIT_NAMES } from "./game.js";

const BACK = 4;
const SLOTS = 8;
const MEMORY = "state.memory.entries";
const PAUSE = 900; // ms between two cards when the agent plays alone
const $ = (id) => document.getElementById(id);

let agent; // the exported agent
let game; // the present game
let state; // the state of the agent before the present card
let thought; // its step on the present card, with the importance of each entry of its memory
let scores; // right answers
let waiting; // what the next key or click does: "answer", "next" or "nothing"
let timer; // of a game that the agent plays alone

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

const color = (suit) => (suit === 1 || suit === 2 ? "red" : "");

function probabilities(logits) {
  const most = Math.max(...logits);
  const weights = logits.map((logit) => Math.exp(logit - most));
  const sum = weights.reduce((total, weight) => total + weight, 0);
  return weights.map((weight) => weight / sum);
}

// One step of the agent, and the same step with each entry of its memory erased: nine rows of one batch.
async function think(card) {
  const size = (state?.[MEMORY].data.length ?? 0) / SLOTS;
  const erase = (slot) => ({ [MEMORY]: (data) => data.fill(0, slot * size, (slot + 1) * size) });
  const changes = [{}, ...Array.from({ length: SLOTS }, (_, slot) => erase(slot))];
  const rows = state ? changes.length : 1;
  const before = state && OnnxAgent.branches(state, changes);
  const step = await agent.step(Array(rows).fill(card.suit), before, Array(rows).fill(!state));
  const beliefs = Array.from({ length: rows }, (_, row) => probabilities(step.logits.slice(4 * row, 4 * row + 4)));
  const action = step.action[0];
  const next = {};
  for (const [name, tensor] of Object.entries(step.state)) {
    const length = tensor.data.length / rows;
    next[name] = new tensor.constructor(tensor.type, tensor.data.slice(0, length), [1, ...tensor.dims.slice(1)]);
  }
  return {
    action,
    beliefs: beliefs[0],
    value: step.value[0],
    lost: beliefs.slice(1).map((erased) => Math.max(0, beliefs[0][action] - erased[action])),
    read: state?.[MEMORY].data, // the memory that this step has read
    next,
  };
}

async function start(alone) {
  clearTimeout(timer);
  game = new RepeatPrevious(BACK);
  state = thought = undefined;
  scores = { you: 0, agent: 0 };
  $("your-marks").replaceChildren();
  $("agent-marks").replaceChildren();
  document.body.classList.toggle("alone", alone);
  await deal(alone);
}

async function deal(alone) {
  const present = game;
  waiting = "nothing";
  const thoughts = await think(game.card);
  if (game !== present) return; // another game was started meanwhile
  thought = thoughts;
  showCards(false);
  showMind(alone); // it shows the cards, so a visitor sees it after the answer
  $("turn").textContent = `${game.turn + 1} / ${game.length}`;
  if (!game.asked) {
    const left = BACK - game.turn;
    ask(`Remember this card. The first question comes ${left === 1 ? "with the next card" : `in ${left} cards`}.`);
  } else {
    ask("Which suit was the card four cards ago?");
  }
  waiting = game.asked ? "answer" : "next";
  showControls();
  if (alone) {
    waiting = "nothing";
    showControls();
    timer = setTimeout(() => {
      if (game.asked) answer(undefined);
      timer = setTimeout(() => proceed(true), PAUSE);
    }, PAUSE);
  }
}

function answer(suit) {
  const right = game.asked.suit;
  const mark = (who, is) => {
    scores[who] += is;
    $(who === "you" ? "your-marks" : "agent-marks").append(element("i", is ? "right" : ""));
  };
  if (suit !== undefined) mark("you", suit === right);
  mark("agent", thought.action === right);
  showCards(true);
  const said = (who, choice) =>
    `${who}: ${SUITS[choice]} <span class="${choice === right ? "right" : "wrong"}">${choice === right ? "right" : "wrong"}</span>`;
  const parts = [...(suit === undefined ? [] : [said("You", suit)]), said("Agent", thought.action)];
  $("question").innerHTML = `It was ${SUITS[right]}. ${parts.join(" · ")}`;
  showMind(true);
  waiting = suit === undefined ? "nothing" : "next";
  showControls();
}

async function proceed(alone) {
  state = thought.next;
  game.next();
  if (!game.over) return deal(alone);
  const all = game.length - BACK;
  waiting = "nothing";
  const result = alone ? "" : `You: ${scores.you} of ${all}. `;
  ask(`The game is over. ${result}Agent: ${scores.agent} of ${all}.`);
  showControls();
}

function ask(text) {
  $("question").textContent = text;
}

function showCards(revealed) {
  const slots = [];
  for (let ago = BACK; ago >= 0; ago--) {
    const card = game.deck[game.turn - ago];
    const slot = element("div", "slot");
    const isAsked = ago === BACK;
    const face = element("div", `card ${!card ? "none" : ago === 0 || (isAsked && revealed) ? "up" : "down"} ${isAsked ? "asked" : ""}`);
    if (face.classList.contains("up")) {
      face.classList.add(color(card.suit) || "black");
      face.append(element("div", "rank", card.rank), element("div", "suit", SUITS[card.suit]));
    } else if (card && isAsked) {
      face.textContent = "?";
    }
    slot.append(face, ago === 0 ? "now" : isAsked ? "four ago" : `${ago} ago`);
    slots.push(slot);
  }
  $("cards").replaceChildren(...slots);
}

function showControls() {
  for (const button of $("answers").children) button.disabled = waiting !== "answer";
  $("your-score").textContent = document.body.classList.contains("alone") ? "–" : scores.you;
  $("agent-score").textContent = scores.agent;
  $("start").textContent = waiting === "next" ? "Next card" : "New game";
}

// Shows the memory that the present step has read, the newest entry on the right; or hides it.
function showMind(revealed) {
  const shown = revealed ? thought : undefined;
  const entries = [];
  const bars = [];
  for (let slot = 0; slot < SLOTS; slot++) {
    const ago = SLOTS - slot;
    const card = shown && game.deck[game.turn - ago];
    const entry = element("div", `entry ${card && ago === BACK ? "asked" : ""}`);
    const canvas = element("canvas");
    if (card && shown.read) paint(canvas, shown.read, slot);
    entry.append(canvas, element("b", card ? color(card.suit) : "", card ? SUITS[card.suit] : "·"), `${ago} ago`);
    entries.push(entry);
    const bar = element("div", "bar");
    bar.title = `${ago} ago`;
    const fill = element("i");
    fill.style.height = `${100 * (card ? (shown.lost[slot] ?? 0) : 0)}%`;
    bar.append(fill);
    bars.push(bar);
  }
  $("memory").replaceChildren(...entries);
  $("bars").replaceChildren(...bars);
  const rows = SUITS.map((symbol, suit) => {
    const row = element("div", "belief");
    const share = shown && game.asked ? shown.beliefs[suit] : 0;
    const track = element("span", "track");
    const fill = element("i");
    fill.style.width = `${100 * share}%`;
    track.append(fill);
    row.append(element("span", color(suit), symbol), track, element("span", "", shown && game.asked ? `${(100 * share).toFixed(1)} %` : "–"));
    return row;
  });
  $("beliefs").replaceChildren(...rows);
  $("value").textContent = shown ? `Return that it expects from here on: ${shown.value.toFixed(3)}` : "";
}

// Draws an entry as a square of cells: blue is positive, orange negative.
function paint(canvas, data, slot) {
  const size = data.length / SLOTS;
  const side = Math.ceil(Math.sqrt(size));
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  for (let index = 0; index < size; index++) {
    const value = data[slot * size + index];
    const strength = Math.min(1, Math.abs(value) / 1.5);
    context.fillStyle = value > 0 ? `rgba(47, 95, 208, ${strength})` : `rgba(217, 98, 43, ${strength})`;
    context.fillRect(index % side, Math.floor(index / side), 1, 1);
  }
}

for (const [suit, symbol] of SUITS.entries()) {
  const button = element("button", color(suit), symbol);
  button.setAttribute("aria-label", SUIT_NAMES[suit]);
  button.addEventListener("click", () => waiting === "answer" && answer(suit));
  $("answers").append(button);
}
$("start").addEventListener("click", () => (waiting === "next" ? proceed(false) : start(false)));
$("watch").addEventListener("click", () => start(true));
document.addEventListener("keydown", (event) => {
  const suit = ["1", "2", "3", "4"].indexOf(event.key);
  if (suit >= 0 && waiting === "answer") answer(suit);
  if (event.key === "Enter" && waiting === "next") {
    event.preventDefault(); // the button that has the focus is not pressed as well
    proceed(false);
  }
});

try {
  agent = await OnnxAgent.load("agent.onnx");
  game = new RepeatPrevious(BACK);
  scores = { you: 0, agent: 0 };
  waiting = "nothing";
  showMind(false);
  showControls();
  $("cards").replaceChildren(...Array.from({ length: BACK + 1 }, () => element("div", "card none")));
  $("start").disabled = $("watch").disabled = false;
  ask("Ready. The agent has learned this game by itself.");
  $("start").focus();
} catch (error) {
  ask(`The agent cannot be loaded: ${error.message}`);
  throw error;
}
