"use strict";
// Small charts in SVG. Colours are classes, so that they follow the theme.

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// About `count` round numbers from `low` to `high`: 1, 2 or 5 times a power of ten; on a log scale of
// some length 1, 2 and 5 of each.
function ticks(low, high, count, log) {
  const found = [];
  if (log) {
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const digit of [1, 2, 5]) {
        const value = digit * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    if (found.length > 2) return found;
    found.length = 0;
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((digit) => digit * power >= rough);
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + 1e-9 * step; index++) found.push(index * step);
  return found;
}

const plain = (value) => String(Number(value.toPrecision(6)));

// A frame with axes; `x` and `y` give {label, low, high, log}. Returns the svg and the two scales.
function frame({ width, height, label, x, y }) {
  const margin = { left: 44, right: 14, top: 22, bottom: 38 };
  const scale = ({ low, high, log }, from, to) => {
    const bend = log ? Math.log : Number;
    return (value) => from + ((to - from) * (bend(value) - bend(low))) / (bend(high) - bend(low));
  };
  const across = scale(x, margin.left, width - margin.right);
  const up = scale(y, height - margin.bottom, margin.top);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": label });
  for (const value of ticks(y.low, y.high, 5, y.log)) {
    const at = up(value);
    svg.append(
      draw("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: at, y2: at }),
      draw("text", { x: margin.left - 8, y: at + 4, "text-anchor": "end" }, plain(value)),
    );
  }
  const bottom = height - margin.bottom;
  for (const value of ticks(x.low, x.high, width < 420 ? 4 : 7, x.log))
    svg.append(draw("text", { x: across(value), y: bottom + 17, "text-anchor": "middle" }, plain(value)));
  svg.append(
    draw("line", { class: "axis", x1: margin.left, x2: width - margin.right, y1: bottom, y2: bottom }),
    draw("text", { x: width - margin.right, y: height - 4, "text-anchor": "end" }, x.label),
    draw("text", { x: 0, y: 11 }, y.label),
  );
  return { svg, across, up };
}

// Lines over epochs.
function lineChart(width, label, x, y, lines) {
  const points = lines.flatMap((line) => line.points);
  const low = Math.max(0, Math.floor(Math.min(...points.map(([, value]) => value)) / 10) * 10);
  const high = Math.ceil(Math.max(...points.map(([, value]) => value)) / 10) * 10;
  const last = Math.max(...points.map(([at]) => at));
  const { svg, across, up } = frame({
    width, height: 260, label, x: { label: x, low: 0, high: last }, y: { label: y, low, high },
  });
  for (const { points, kind } of lines)
    svg.append(
      draw("path", { class: kind, d: "M" + points.map(([at, value]) => `${across(at).toFixed(1)} ${up(value).toFixed(1)}`).join("L") }),
      draw("circle", { class: kind, r: 3, cx: across(points.at(-1)[0]), cy: up(points.at(-1)[1]) }),
    );
  return svg;
}

// Accuracy by confidence; `bins` are [images, correct, summed confidence], of equal width.
function reliabilityChart(width, label, bins) {
  const { svg, across, up } = frame({
    width, height: 260, label,
    x: { label: "confidence, %", low: 0, high: 100 }, y: { label: "correct, %", low: 0, high: 100 },
  });
  const step = 100 / bins.length;
  bins.forEach(([images, correct], index) => {
    if (images === 0) return;
    const top = up((100 * correct) / images);
    const bar = draw("rect", {
      class: "ours", x: across(index * step) + 1, width: across(step) - across(0) - 2, y: top, height: up(0) - top,
    });
    bar.append(draw("title", {}, `${(index * step).toFixed(0)} to ${((index + 1) * step).toFixed(0)} %: ${images} images, ${((100 * correct) / images).toFixed(1)} % correct`));
    svg.append(bar);
  });
  svg.append(draw("line", { class: "ideal", x1: across(0), y1: up(0), x2: across(100), y2: up(100) }));
  return svg;
}

// One point for each of `points`: {name, x, y, kind, href, twin}; twins are joined. Names give way to each other.
function scatterChart(width, label, x, y, points) {
  const values = (key) => points.map((point) => point[key]);
  const low = Math.min(...values("x")), high = Math.max(...values("x"));
  const room = Math.max(0.5, 0.15 * (Math.max(...values("y")) - Math.min(...values("y"))));
  const { svg, across, up } = frame({
    width, height: width < 560 ? 340 : 380, label,
    x: { label: x, low: low / 1.5, high: high * 1.5, log: true },
    y: { label: y, low: Math.min(...values("y")) - room, high: Math.max(...values("y")) + room },
  });
  const byName = new Map(points.map((point) => [point.name, point]));
  for (const point of points) {
    const twin = byName.get(point.twin);
    if (twin) svg.append(draw("line", { class: "pair", x1: across(point.x), y1: up(point.y), x2: across(twin.x), y2: up(twin.y) }));
  }
  const taken = [];
  for (const point of points) {
    const at = across(point.x), left = at > width * 0.6, size = 7 * point.name.length;
    let height = up(point.y) + 4;
    const from = left ? at - 10 - size : at + 10;
    while (taken.some((box) => Math.abs(box.height - height) < 14 && from < box.from + box.size && box.from < from + size)) height += 14;
    taken.push({ from, size, height });
    svg.append(
      draw("a", { href: point.href, "aria-label": point.title },
        draw("circle", { class: point.kind, r: 6, cx: at, cy: up(point.y) }),
        draw("text", { class: "name", x: left ? at - 11 : at + 11, y: height, "text-anchor": left ? "end" : "start" }, point.name)),
    );
  }
  return svg;
}
