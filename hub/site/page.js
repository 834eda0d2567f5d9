"use strict";
// The table, the chart of costs and the panel of one student, from ZOO (zoo.js).

const students = ZOO.students;
const byName = new Map(students.map((student) => [student.name, student]));
const find = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const signed = (value, digits = 2) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(digits);
const percent = (value) => value.toFixed(2);
const kindOf = (student) => (student.method === "cross-entropy" ? "theirs" : "ours");

const COLUMNS = [
  { key: "name", title: "Weights", value: (s) => s.name },
  { key: "method", title: "Trained with", value: (s) => s.method },
  { key: "top1", title: "Top\u20111\u00a0%", value: (s) => s.top1, show: percent },
  { key: "gain", title: "Gain", value: (s) => s.gain?.mean ?? null, cell: gainCell },
  { key: "params", title: "Params, M", value: (s) => s.params / 1e6, show: percent },
  { key: "macs", title: "Multiply-adds, M", value: (s) => s.macs / 1e6, show: (v) => v.toFixed(1) },
  { key: "size", title: "Size, MB", value: (s) => s.bytes / 1e6, show: percent },
  { key: "int8size", title: "int8, MB", value: (s) => s.int8.bytes / 1e6, show: percent },
  { key: "latency", title: "Latency, ms", value: (s) => s.float32.latency_ms["1"], show: percent },
  { key: "int8latency", title: "int8, ms", value: (s) => s.int8.latency_ms["1"], show: percent },
];
const FIGURES = COLUMNS.filter((column) => column.key !== "name" && column.key !== "method");
const COSTS = FIGURES.filter((column) => column.key !== "top1" && column.key !== "gain");

// --- the zoo ----------------------------------------------------------------------------------------------------------

const sorting = { key: "top1", descending: true };

function gainCell({ gain }) {
  if (!gain) return make("td", { class: "none" }, "\u2013");
  const note = gain.pairs === 1 ? "one pair" : `${signed(gain.low)} to ${signed(gain.high)}, ${gain.pairs} pairs`;
  return make("td", {}, signed(gain.mean), make("span", { class: "small" }, note));
}

function shown() {
  const words = find("words").value.trim().toLowerCase().split(/\s+/);
  const column = COLUMNS.find(({ key }) => key === find("filter-column").value);
  const limit = find("filter-value").value === "" ? null : Number(find("filter-value").value);
  const least = find("filter-kind").value === "least";
  const kept = students.filter((student) => {
    const text = `${student.name} ${student.method}`.toLowerCase();
    const value = column.value(student);
    const within = limit === null || (value !== null && (least ? value >= limit : value <= limit));
    return within && words.every((word) => text.includes(word));
  });
  const { value } = COLUMNS.find(({ key }) => key === sorting.key);
  const order = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b) * (sorting.descending ? -1 : 1);
  return kept.sort((a, b) => {
    const [one, two] = [value(a), value(b)];
    if (one === null || two === null) return (one === null) - (two === null); // what is not known comes last
    return order(one, two);
  });
}

function showTable() {
  for (const header of document.querySelectorAll("#table thead th")) {
    if (header.dataset.key === sorting.key) header.setAttribute("aria-sort", sorting.descending ? "descending" : "ascending");
    else header.removeAttribute("aria-sort");
  }
  const rows = shown();
  find("table").tBodies[0].replaceChildren(...rows.map((student) => make("tr", {}, ...COLUMNS.map((column) => {
    if (column.key === "name") return make("th", { scope: "row" }, make("a", { href: `#${student.name}` }, `${student.architecture}.`, make("wbr"), student.name.slice(student.architecture.length + 1)));
    if (column.cell) return column.cell(student);
    return make("td", column.show ? {} : { class: "words" }, column.show ? column.show(column.value(student)) : column.value(student));
  }))));
  if (rows.length === 0)
    find("table").tBodies[0].append(make("tr", {}, make("td", { colspan: COLUMNS.length, class: "empty" }, "No student is like that.")));
  find("count").textContent = `${rows.length} of ${students.length} students`;
}

function buildTable() {
  for (const { key, title, show, cell } of COLUMNS) {
    const button = make("button", { type: "button" }, title);
    button.addEventListener("click", () => {
      sorting.descending = sorting.key === key ? !sorting.descending : Boolean(show || cell) && !COSTS.some((cost) => cost.key === key);
      sorting.key = key;
      showTable();
    });
    const header = make("th", { scope: "col", "data-key": key, class: show || cell ? "" : "words" }, button);
    find("table").tHead.rows[0].append(header);
  }
  for (const { key, title } of FIGURES) find("filter-column").append(make("option", { value: key }, title));
  find("filter").addEventListener("input", showTable);
  find("filter").addEventListener("submit", (event) => event.preventDefault());
  find("hardware").textContent = students[0].hardware;
  showTable();
}

// --- accuracy against cost --------------------------------------------------------------------------------------------

function showCosts() {
  const cost = COSTS.find(({ key }) => key === find("cost-column").value);
  const points = students.map((student) => ({
    name: student.name, href: `#${student.name}`, twin: student.twin, kind: kindOf(student),
    x: cost.value(student), y: student.top1,
    title: `${student.name}: top-1 ${percent(student.top1)} %, ${cost.title} ${cost.show(cost.value(student))}`,
  }));
  const box = find("cost-chart");
  box.replaceChildren(
    scatterChart(box.clientWidth, `Top-1 against ${cost.title}`, `${cost.title} (log)`, "top-1, %", points),
    make("p", { class: "key" }, make("span", {}, "Tf-FD"), make("span", { class: "theirs" }, "plain; a line joins twins")),
  );
}

// --- one student ------------------------------------------------------------------------------------------------------

function card(title, ...children) {
  return make("div", {}, make("h3", {}, title), ...children);
}

function fact(title, value, note) {
  return make("div", {}, make("dt", {}, title), make("dd", {}, value, ...(note ? [make("div", { class: "small" }, note)] : [])));
}

function facts(student) {
  const { gain } = student;
  const interval = !gain ? "" : gain.pairs === 1 ? "one pair of runs" : `${signed(gain.low)} to ${signed(gain.high)}, ${gain.pairs} pairs`;
  return make("dl", { class: "facts" },
    fact("Top-1", `${percent(student.top1)} %`, student.data),
    ...(gain ? [fact("Gain over plain", signed(gain.mean), interval)] : []),
    fact("Top-5", `${percent(student.top5)} %`),
    fact("Calibration error", `${percent(student.ece)} %`),
    fact("int8", `${percent(student.int8.top1)} %`, `${(student.int8.bytes / 1e6).toFixed(2)} MB, ${student.int8.latency_ms["1"].toFixed(2)} ms`),
    fact("Trained", `${student.epochs} epochs`, `${student.method}, seed ${student.seed}`),
  );
}

function loading(student) {
  const code = `import timm, tffd_zoo\n\nmodel = timm.create_model("${student.name}", pretrained=True).eval()`;
  const button = make("button", { type: "button", class: "plain" }, "Copy");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return make("div", { class: "code" }, make("pre", { tabindex: 0, "aria-label": "How to load it" }, code), button);
}

function curveCard(student, width) {
  const lines = [];
  if (student.curve) lines.push({ points: student.curve, kind: "ours" });
  if (student.twinCurve) lines.push({ points: student.twinCurve, kind: "theirs" });
  if (lines.length === 0) return card("Training", make("p", { class: "small" }, "The record of this run was not kept."));
  const chart = lineChart(width, `Top-1 by epoch of ${student.name}`, "epoch", "top-1, %", lines);
  const key = make("p", { class: "key" }, make("span", {}, student.name));
  if (student.twinCurve) key.append(make("span", { class: "theirs" }, student.twin));
  return card("Training", make("div", { class: "chart" }, chart), key);
}

function calibrationCard(student, width) {
  const note = `Of the images that it is so sure of, so many are right; on the dotted line confidence can be taken at its word. Expected error ${percent(student.ece)} %.`;
  return card("Calibration",
    make("div", { class: "chart" }, reliabilityChart(width, `Accuracy of ${student.name} by confidence`, student.calibration)),
    make("p", { class: "small" }, note));
}

// The matrix with its classes in `order`, as a picture; what the pointer is on is told below.
function confusionCard(student) {
  const { labels, order, confusion } = student, classes = labels.length;
  const count = (truth, guess) => confusion[truth * classes + guess];
  const total = labels.map((_, truth) => labels.reduce((sum, _, guess) => sum + count(truth, guess), 0));
  const canvas = make("canvas", { width: classes, height: classes, role: "img", "aria-label": "Confusion matrix; its largest entries are in the table" });
  const paint = () => {
    const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    for (const [name, alpha] of [["--paper", () => 1], ["--ours", (row, column) => Math.sqrt(count(order[row], order[column]) / Math.max(1, total[order[row]]))]]) {
      context.fillStyle = style.getPropertyValue(name);
      for (let row = 0; row < classes; row++)
        for (let column = 0; column < classes; column++) {
          context.globalAlpha = alpha(row, column);
          context.fillRect(column, row, 1, 1);
        }
    }
  };
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  const told = make("p", { class: "small" }, "Rows: what it is. Columns: what it is taken for. Classes that are confused stand together.");
  canvas.addEventListener("pointermove", (event) => {
    const place = (at, size) => Math.min(classes - 1, Math.max(0, Math.floor((at / size) * classes)));
    const truth = order[place(event.offsetY, canvas.clientHeight)], guess = order[place(event.offsetX, canvas.clientWidth)];
    told.textContent = `${count(truth, guess)} of ${total[truth]} images of ${readable(labels[truth])} are taken for ${readable(labels[guess])}.`;
  });
  const pairs = [];
  for (let truth = 0; truth < classes; truth++)
    for (let guess = 0; guess < classes; guess++) if (truth !== guess && count(truth, guess)) pairs.push([truth, guess, count(truth, guess)]);
  pairs.sort((a, b) => b[2] - a[2]);
  const rows = pairs.slice(0, 8).map(([truth, guess, n]) => make("tr", {},
    make("th", { scope: "row" }, readable(labels[truth])), make("td", { class: "words" }, readable(labels[guess])), make("td", {}, `${n} of ${total[truth]}`)));
  const head = make("tr", {}, make("th", { scope: "col" }, "Most often, of"), make("th", { scope: "col", class: "words" }, "taken for"), make("th", { scope: "col" }, "images"));
  return [
    card("Confusion", make("div", { class: "confusion" }, canvas), told),
    card("What it confuses", make("table", { class: "compact" }, make("tbody", {}, head, ...rows))),
  ];
}

const readable = (label) => label.replaceAll("_", " ");

function mapsOf(student, name, stage, whose) {
  const picture = (kind) => make("img", {
    src: `${student.folder}/${stage[kind].file}`, width: stage[kind].width, height: stage[kind].height, loading: "lazy",
    alt: `${kind} maps of ${stage.stage}, ${name}`,
  });
  return make("figure", {},
    make("figcaption", { class: "small" }, make("span", { class: "who" }, whose), ` salient, and redundant at the place of their teachers: cosine ${stage.likeness.toFixed(2)}, any two ${stage.anyLikeness.toFixed(2)}; rank ${stage.rank.toFixed(1)} of ${stage.channels}`),
    make("div", { class: "pairs" }, picture("salient"), picture("redundant")));
}

function maps(student) {
  const models = Object.entries(student.stages);
  const [[, own]] = models;
  return make("div", { class: "maps" },
    make("h3", {}, "Feature maps by salience"),
    make("p", { class: "small" }, "Each map of the image from its lowest value (dark) to its highest (bright), the most salient channels first. Cosines and ranks are over images of the test split."),
    ...own.map((stage, index) => make("div", { class: "stage" },
      make("div", {}, ...(index === 0 ? [make("img", { class: "original", src: `${student.folder}/image.png`, alt: "The image that the maps are of" })] : []), make("div", { class: "small" }, stage.stage)),
      ...models.filter(([, stages]) => stages[index]).map(([name, stages]) => mapsOf(student, name, stages[index], name === student.name ? (student.method === "cross-entropy" ? "This one," : `${student.method},`) : "Its plain twin,")))));
}

function showStudent() {
  const student = byName.get(find("student-choice").value);
  const panel = find("student-panel"), whole = panel.clientWidth;
  find("student-name").textContent = student.name;
  const half = matchMedia("(max-width: 720px)").matches ? whole : (whole - 48) / 2; // two columns 3rem apart
  panel.replaceChildren(facts(student), loading(student),
    make("div", { class: "cards" }, curveCard(student, half), calibrationCard(student, half), ...confusionCard(student)),
    maps(student));
}

function followHash() {
  const name = decodeURIComponent(location.hash.slice(1));
  if (!byName.has(name)) return;
  find("student-choice").value = name;
  showStudent();
  find("student").scrollIntoView();
  find("student-name").focus({ preventScroll: true });
}

// --- start ------------------------------------------------------------------------------------------------------------

for (const student of shownFirst()) find("student-choice").append(make("option", {}, student.name));
for (const { key, title } of COSTS) find("cost-column").append(make("option", { value: key, ...(key === "macs" ? { selected: "" } : {}) }, title));

function shownFirst() {
  return [...students].sort((a, b) => (a.method === "cross-entropy") - (b.method === "cross-entropy") || b.top1 - a.top1);
}

buildTable();
find("cost-column").addEventListener("input", showCosts);
find("student-choice").addEventListener("input", () => { location.hash = find("student-choice").value; });
addEventListener("hashchange", followHash);

// Charts are drawn for the width that there is, and again when it changes.
let width = 0;
new ResizeObserver(([{ contentRect }]) => {
  if (contentRect.width === width || contentRect.width === 0) return;
  const first = width === 0;
  width = contentRect.width;
  showCosts();
  showStudent();
  if (first) followHash();
}).observe(find("top"));

// What is large is kept once it was used: asked for again, it passes through the worker, which may have come after it.
function keepLargeFiles() {
  if (!navigator.serviceWorker?.controller) return;
  for (const { name } of performance.getEntriesByType("resource")) if (/\.(onnx|wasm)$/.test(name)) fetch(name);
}

if (location.protocol.startsWith("http") && "serviceWorker" in navigator) {
  navigator.serviceWorker.addEventListener("controllerchange", keepLargeFiles);
  navigator.serviceWorker.register("worker.js").catch(() => {}); // not everywhere: in some frames, or with no disk
}
