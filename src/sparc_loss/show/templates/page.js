"use strict";

// One article per pair. A word or a patch is shown while it is pointed at or has the focus; else the pinned word is.
for (const article of document.querySelectorAll(".pair")) {
  const { grid: [rows, columns], extent, words, weights } = JSON.parse(
    article.querySelector("script[type='application/json']").textContent
  );
  const count = rows * columns;
  const highest = weights.map((row) => Math.max(...row));
  const light = (word, patch) => (weights[word][patch] / highest[word]) ** 2;

  const image = article.querySelector("img");
  const frame = article.querySelector(".extent");
  const veil = article.querySelector(".veil");
  const grid = article.querySelector(".patches");
  const status = article.querySelector(".status");
  const buttons = [...article.querySelectorAll(".word")];
  const cells = [];

  image.classList.toggle("small", Number(image.getAttribute("width")) < 160);
  frame.style.height = `${extent[0] * 100}%`;
  frame.style.width = `${extent[1] * 100}%`;
  grid.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  grid.setAttribute("aria-rowcount", rows);
  grid.setAttribute("aria-colcount", columns);
  veil.width = columns;
  veil.height = rows;

  for (let row = 0; row < rows; row += 1) {
    const line = document.createElement("div");
    line.setAttribute("role", "row");
    for (let column = 0; column < columns; column += 1) {
      const cell = document.createElement("div");
      cell.className = "patch";
      cell.setAttribute("role", "gridcell");
      cell.setAttribute("aria-label", `Row ${row + 1}, column ${column + 1}`);
      cell.tabIndex = cells.length ? -1 : 0;
      cell.dataset.patch = cells.length;
      cells.push(cell);
      line.append(cell);
    }
    grid.append(line);
  }

  let pinned = null;
  let focused = null;
  let pointed = null;

  const percent = (share) => {
    const value = share * 100;
    if (value > 0 && value < 0.1) return "less than 0.1 %";
    if (value >= 99.5 && value < 100) return "more than 99 %";
    return `${value.toFixed(value < 10 && value > 0 ? 1 : 0)} %`;
  };

  const tellWord = (word) => {
    const kept = weights[word].filter((weight) => weight > 0).length;
    const best = weights[word].indexOf(highest[word]);
    const share = percent(highest[word]);
    const place = weights[word].filter((weight) => weight === highest[word]).length > 1
      ? `Several share the highest weight, ${share} each.`
      : `Its highest is row ${Math.floor(best / columns) + 1}, column ${(best % columns) + 1}, with ${share} of the weight.`;
    return `“${words[word]}” keeps ${kept} of ${count} patches, ${percent(kept / count)}. ${place}`;
  };

  const tellPatch = (patch) => {
    const place = `Row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
    const selecting = words.map((_, word) => word).filter((word) => weights[word][patch] > 0);
    if (!selecting.length) return `${place}: no word selects this patch.`;
    selecting.sort((one, other) => weights[other][patch] - weights[one][patch]);
    const named = selecting.slice(0, 4).map((word) => `“${words[word]}” ${percent(weights[word][patch])}`);
    return `${place} is selected by ${selecting.length} of ${words.length} words: ${named.join(", ")}`
      + `${selecting.length > 4 ? " …" : ""}`;
  };

  const drawVeil = (word) => {
    article.classList.toggle("lit", word !== null);
    for (const cell of cells) cell.classList.remove("highest");
    if (word === null) return;
    const context = veil.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    for (let patch = 0; patch < count; patch += 1) {
      pixels.data.set([14, 17, 23, Math.round(255 * (1 - light(word, patch)))], 4 * patch);
    }
    context.putImageData(pixels, 0, 0);
    if (weights[word].filter((weight) => weight === highest[word]).length === 1) {
      cells[weights[word].indexOf(highest[word])].classList.add("highest");
    }
  };

  const show = () => {
    const shown = pointed ?? focused ?? {};
    const patch = shown.patch ?? null;
    const word = shown.word ?? pinned;
    drawVeil(word);
    buttons.forEach((button, index) => {
      const brightness = patch !== null ? light(index, patch) : Number(index === word);
      button.style.setProperty("--light", brightness.toFixed(3));
      button.classList.toggle("unselected", patch !== null && weights[index][patch] === 0);
      button.setAttribute("aria-pressed", String(index === pinned));
    });
    if (patch !== null) status.textContent = tellPatch(patch);
    else status.textContent = word !== null ? tellWord(word) : "";
  };

  const follow = (element, what) => {
    element.addEventListener("pointerenter", () => { pointed = what; show(); });
    element.addEventListener("pointerleave", () => { pointed = null; show(); });
    element.addEventListener("focus", () => {
      // A click gives the focus as well, and what was clicked must not stay lit for that.
      focused = element.matches(":focus-visible") ? what : null;
      show();
    });
    element.addEventListener("blur", () => { focused = null; show(); });
  };

  buttons.forEach((button, word) => {
    follow(button, { word });
    button.addEventListener("click", () => {
      pinned = pinned === word ? null : word;
      show();
    });
  });
  cells.forEach((cell, patch) => follow(cell, { patch }));

  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  grid.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const patch = cells.indexOf(document.activeElement);
    const row = Math.min(Math.max(Math.floor(patch / columns) + step[0], 0), rows - 1);
    const column = Math.min(Math.max((patch % columns) + step[1], 0), columns - 1);
    cells[patch].tabIndex = -1;
    cells[row * columns + column].tabIndex = 0;
    cells[row * columns + column].focus();
  });
  article.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    pinned = null;
    focused = null;
    show();
  });
}

document.getElementById("smooth").addEventListener("change", (event) => {
  document.body.classList.toggle("smoothly", event.target.checked);
});
