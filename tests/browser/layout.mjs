// Opens built pages in headless Chromium and looks for content that is cut off. Arguments: path of Chromium, folder for pictures, names
// of pages to take pictures of (comma-separated), addresses. Prints a JSON object: problems by address and width.
import { createRequire } from "node:module";

const require = createRequire(new URL("../../examples/browser/package.json", import.meta.url));
const { chromium } = require("playwright-core");
const [executable, folder, pictured, ...addresses] = process.argv.slice(2);
const OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
const WIDTHS = [1300, 400];

// Runs in the page. An element may be wider than the window only inside a box that scrolls.
function findCutOff() {
  const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  const describe = (element) => `${element.tagName.toLowerCase()} "${element.textContent.trim().slice(0, 40)}"`;
  const found = [];
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) found.push(`the page scrolls: ${root.scrollWidth} > ${root.clientWidth} pixels`);
  const article = document.querySelector("article") ?? document.body;
  const column = article.closest(".content") ?? article; // headings reach into the padding of the column
  const edge = Math.min(root.clientWidth, Math.ceil(column.getBoundingClientRect().right));
  for (const element of article.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (box.width === 0 || box.height === 0) continue;
    let parent = element.parentElement;
    while (parent && parent !== article && !scrolls(parent)) parent = parent.parentElement;
    const inScrollingBox = parent && parent !== article && scrolls(parent);
    if (!inScrollingBox && box.right > edge + 1) found.push(`wider than its column: ${describe(element)}`);
    const style = getComputedStyle(element);
    const hides = ["hidden", "clip"].includes(style.overflowX) && box.width > 1;
    if (hides && element.scrollWidth > element.clientWidth + 1) found.push(`cut off: ${describe(element)}`);
  }
  return found.slice(0, 5);
}

const browser = await chromium.launch({ executablePath: executable, headless: true, args: OPTIONS });
const problems = {};
for (const width of WIDTHS) {
  const page = await browser.newPage({ viewport: { width, height: 900 } });
  for (const address of addresses) {
    await page.goto(address);
    const found = await page.evaluate(findCutOff);
    if (found.length) problems[`${address} at ${width}`] = found;
    const name = new URL(address).pathname.split("/").pop().replace(".html", "");
    if (pictured.split(",").includes(name)) await page.screenshot({ path: `${folder}/${name}_${width}.png` });
  }
  await page.close();
}
await browser.close();
console.log(JSON.stringify(problems));
