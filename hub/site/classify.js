"use strict";
// The box: an image in, five classes out, by the int8 student in this browser. Nothing leaves it.

const MOST_PIXELS = 4e6; // larger photographs are reduced by the browser before the student sees them
const sessions = new Map();
let latest = 0; // counts the images, so that a slow answer doesn't replace a newer one
let current = null;

function tell(text) {
  find("status").textContent = text;
}

function loadRuntime() {
  loadRuntime.promise ??= new Promise((resolve, reject) => {
    const script = make("script", { src: "runtime/ort.wasm.min.js" });
    script.addEventListener("load", () => {
      ort.env.wasm.wasmPaths = new URL("runtime/", location.href).href;
      ort.env.wasm.numThreads = 1; // more need headers that plain files don't have
      resolve();
    });
    script.addEventListener("error", () => reject(new Error("the runtime cannot be loaded")));
    document.head.append(script);
  });
  return loadRuntime.promise;
}

async function openStudent(student) {
  await loadRuntime();
  if (!sessions.has(student.name)) sessions.set(student.name, startSession(student.model));
  return sessions.get(student.name);
}

async function startSession(model) {
  const session = await ort.InferenceSession.create(model);
  await run(session, new Uint8Array(3 * 32 * 32), [1, 32, 32, 3]); // the first run is slower than all others
  keepLargeFiles();
  return session;
}

async function run(session, pixels, shape) {
  const { probabilities } = await session.run({ images: new ort.Tensor("uint8", pixels, shape) });
  return probabilities.data;
}

// RGB bytes, as Pillow reads them, but the right way up.
async function readPixels(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const shrink = Math.min(1, Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height)));
  const width = Math.max(2, Math.round(bitmap.width * shrink)), height = Math.max(2, Math.round(bitmap.height * shrink));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  const pixels = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    pixels[to++] = data[from];
    pixels[to++] = data[from + 1];
    pixels[to++] = data[from + 2];
  }
  return { bitmap, pixels, shape: [1, height, width, 3] };
}

function preview(bitmap) {
  const canvas = find("preview"), context = canvas.getContext("2d"), side = canvas.width;
  const scale = side / Math.min(bitmap.width, bitmap.height);
  context.imageSmoothingEnabled = scale < 1;
  context.imageSmoothingQuality = "high";
  const width = bitmap.width * scale, height = bitmap.height * scale;
  context.clearRect(0, 0, side, side);
  context.drawImage(bitmap, (side - width) / 2, (side - height) / 2, width, height); // the crop that the student sees
  canvas.hidden = false;
  find("invitation").hidden = true;
  find("drop").classList.add("full");
}

async function classify(blob, label = null) {
  const number = ++latest;
  const student = byName.get(find("try-student").value);
  current = [blob, label];
  try {
    let image;
    try {
      image = await readPixels(blob);
    } catch {
      throw new Error("this is no image that the browser can read");
    }
    if (number !== latest) return;
    preview(image.bitmap);
    tell(`Loading ${student.name}, ${(student.int8.bytes / 1e6).toFixed(1)} MB\u2026`);
    const session = await openStudent(student);
    const start = performance.now();
    const probabilities = await run(session, image.pixels, image.shape);
    if (number !== latest) return;
    answer(student, probabilities, performance.now() - start, label);
  } catch (error) {
    if (number !== latest) return;
    find("answers").replaceChildren();
    const mend = location.protocol === "file:" ? " A page opened from a disk cannot; serve its folder: python -m http.server." : "";
    tell(`It could not be classified: ${error.message}.${mend}`);
  }
}

function answer(student, probabilities, milliseconds, label) {
  const best = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, 5);
  find("answers").replaceChildren(...best.map((index) => {
    const share = 100 * probabilities[index];
    const bar = make("span");
    bar.style.width = `${share}%`;
    return make("li", { "data-class": student.labels[index] },
      make("span", {}, readable(student.labels[index])), make("span", { class: "number" }, `${share.toFixed(1)} %`),
      make("div", { class: "bar", "aria-hidden": "true" }, bar));
  }));
  const truth = label ? `Its label is ${readable(label)}. ` : "";
  tell(`${truth}${student.name}, int8, in ${milliseconds < 10 ? milliseconds.toFixed(1) : milliseconds.toFixed(0)} ms. It knows ${student.labels.length} classes at ${student.pixels} \u00d7 ${student.pixels} pixels, and names one of them whatever it is shown.`);
}

for (const student of shownFirst()) find("try-student").append(make("option", {}, student.name));
find("try-student").addEventListener("input", () => { if (current) classify(...current); });
find("file").addEventListener("change", ({ target }) => {
  if (target.files.length) classify(target.files[0]);
  target.value = "";
});
const drop = find("drop");
for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.remove("over"); });
drop.addEventListener("drop", ({ dataTransfer }) => { if (dataTransfer.files.length) classify(dataTransfer.files[0]); });
addEventListener("paste", ({ clipboardData }) => {
  const file = [...clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) classify(file);
});
const showcase = students[0];
for (const { file, label } of showcase.samples) {
  const source = `${showcase.folder}/${file}`;
  const button = make("button", { type: "button", title: readable(label) }, make("img", { src: source, alt: readable(label) }));
  button.addEventListener("click", async () => classify(await (await fetch(source)).blob(), label));
  find("samples").append(button);
}
