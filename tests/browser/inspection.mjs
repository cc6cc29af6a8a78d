// Drives pages of `sb3-cyborg inspect --html` in headless Chromium. Arguments: the file of its inputs, and a folder for pictures.
// Prints a JSON object: what each page shows, by its name.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const require = createRequire(new URL("../../examples/browser/package.json", import.meta.url));
const { chromium } = require("playwright-core");
const [inputs, pictures] = process.argv.slice(2);
const { executable, pages, step } = JSON.parse(readFileSync(inputs, "utf8"));
const OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
OPTIONS.push("--disable-component-update", "--disable-sync");

const browser = await chromium.launch({ executablePath: executable, headless: true, args: OPTIONS });
const problems = [];
const requests = new Set();

async function open(file, width) {
  const page = await browser.newPage({ viewport: { width, height: 900 } });
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && problems.push(message.text()));
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("request", (request) => requests.add(request.url().slice(0, 200)));
  await page.goto(pathToFileURL(file).href);
  return page;
}

const overflow = (page) =>
  page.evaluate(() => Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - document.documentElement.clientWidth);

const counter = async (page) => Number((await page.textContent("#counter")).match(/step (\d+)/)[1]);

// The text of the tip over a cell of a chart: `step` of `steps` from the left, `row` of `rows` from below.
async function tip(page, title, [step, steps], [row, rows]) {
  const canvas = page.locator(`canvas[aria-label^="${title}"]`).first();
  await canvas.scrollIntoViewIfNeeded();
  const area = await canvas.boundingBox();
  await page.mouse.move(area.x + ((step + 0.5) / steps) * area.width, area.y + (1 - (row + 0.5) / rows) * area.height);
  return page.textContent("#tip");
}

async function use(page) {
  const steps = Number(await page.getAttribute("#slider", "max")) + 1;
  const seen = { steps, title: await page.textContent("h1"), cards: await page.locator("h2").allTextContents() };
  seen.charts = await page.locator("h3").allTextContents();
  await page.locator("#slider").fill(String(step));
  seen.slider = await counter(page);
  seen.now = await page.textContent("#now");
  seen.reads = await page.locator(".read").allTextContents();
  seen.bars = await page.evaluate(() =>
    [...document.querySelectorAll(".odds div")].map((box) => box.firstElementChild.getBoundingClientRect().width / box.clientWidth),
  );
  seen.frames = await page.locator("#now img").count();
  seen.decoded = await page.evaluate(() => [...document.images].every((image) => image.complete && image.naturalWidth > 0));
  seen.drawn = await page.evaluate(() =>
    [...document.querySelectorAll("canvas")].map((canvas) => {
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      return new Set(new Uint32Array(pixels.buffer)).size;
    }),
  );
  if (seen.charts.includes("Attention over past steps")) {
    seen.tip = await tip(page, "Attention over past steps", [step, steps], [step - 1, steps]);
    seen.future = await tip(page, "Attention over past steps", [step, steps], [step + 1, steps]);
  }
  seen.rewardTip = await tip(page, "Reward", [step, steps], [0, 1]);
  await page.mouse.move(1, 1);
  seen.tipIsHidden = await page.locator("#tip").isHidden();
  await page.locator('canvas[aria-label="Reward"]').click({ position: { x: 2, y: 20 } });
  seen.clicked = await counter(page);
  await page.locator("#slider").focus(); // an arrow key is one step there as well, and not two
  for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft"]) await page.keyboard.press(key);
  seen.arrows = await counter(page);
  await page.keyboard.press("End");
  seen.end = await counter(page);
  await page.click("#play");
  await page.waitForFunction(() => /step [1-9]/.test(document.querySelector("#counter").textContent), null, { timeout: 5000 });
  seen.playing = await page.textContent("#play");
  await page.click("#play");
  seen.stopped = await page.textContent("#play");
  return seen;
}

const result = {};
for (const [name, file] of Object.entries(pages)) {
  for (const width of [1300, 400]) {
    const page = await open(file, width);
    if (width === 1300) result[name] = await use(page);
    else await page.locator("#slider").fill(String(step));
    await page.evaluate(() => scrollTo(0, 0));
    await page.mouse.move(1, 1);
    await page.screenshot({ path: `${pictures}/${name}_${width}.png`, fullPage: true });
    result[name][`overflow_${width}`] = await overflow(page);
    result[name].attacked = await page.evaluate(() => "attacked" in window);
    await page.close();
  }
}
await browser.close();
console.log(JSON.stringify({ pages: result, problems, requests: [...requests] }));
