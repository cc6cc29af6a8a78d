// Drives the page of examples/browser in headless Chromium. Arguments: address of the page, the file of its inputs, and a folder
// for pictures. Prints a JSON object.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const require = createRequire(new URL("../../examples/browser/package.json", import.meta.url));
const { chromium } = require("playwright-core");
const [address, inputs, pictures] = process.argv.slice(2);
const { executable, observations, starts } = JSON.parse(readFileSync(inputs, "utf8"));
const OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
OPTIONS.push("--disable-component-update", "--disable-sync");

const browser = await chromium.launch({ executablePath: executable, headless: true, args: OPTIONS });
const problems = [];
const requests = new Set();

async function open(width) {
  const page = await browser.newPage({ viewport: { width, height: 900 } });
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && problems.push(message.text()));
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("request", (request) => requests.add(new URL(request.url()).origin));
  await page.goto(address);
  await page.waitForSelector("#start:enabled", { timeout: 60_000 });
  return page;
}

// The agent alone: a row for each environment, with ends of episodes.
async function replay(page) {
  return page.evaluate(
    async ([observations, starts]) => {
      const { OnnxAgent } = await import("./agent.js");
      const agent = await OnnxAgent.load("agent.onnx");
      const steps = { action: [], value: [], logits: [] };
      let state;
      for (const [index, observation] of observations.entries()) {
        const step = await agent.step(observation, state, starts[index]);
        state = step.state;
        for (const name of Object.keys(steps)) steps[name].push(step[name]);
      }
      return { steps, isolated: globalThis.crossOriginIsolated };
    },
    [observations, starts],
  );
}

// A game of a visitor who answers "spades" each time. Returns what the page says at the end.
async function play(page, name) {
  await page.click("#start");
  for (let turn = 0; ; turn++) {
    await page.waitForFunction(
      () => document.querySelector("#start").textContent === "Next card" || document.querySelector("#answers button:enabled"),
    );
    if (await page.locator("#answers button:enabled").count()) {
      if ((await page.locator("#memory b").allTextContents()).some((text) => text !== "·")) problems.push("a card is shown early");
      await page.keyboard.press("1");
      if (turn === 8) await page.screenshot({ path: `${pictures}/${name}.png`, fullPage: true });
    }
    await page.keyboard.press("Enter");
    const said = await page.textContent("#question");
    if (said.startsWith("The game is over")) return said;
  }
}

const result = {};
for (const [name, width] of [["wide", 1300], ["narrow", 400]]) {
  const page = await open(width);
  if (name === "wide") Object.assign(result, await replay(page));
  result[name] = await play(page, name);
  result[`${name}_overflow`] = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
}
await browser.close();
console.log(JSON.stringify({ ...result, problems, origins: [...requests] }));
