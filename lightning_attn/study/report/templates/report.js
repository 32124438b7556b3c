(() => {
  "use strict";
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const one = id => document.getElementById(id);

  // Tables: sorted by the column that is clicked, what has no value last.
  const key = (row, column) => {
    const cell = (row.rows ? row.rows[0] : row).cells[column];
    return "v" in cell.dataset ? cell.dataset.v : cell.textContent.trim();
  };
  for (const table of all("table.sortable")) for (const click of all("thead button", table)) click.onclick = () => {
    const head = click.parentNode, column = head.cellIndex, ascending = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const bodies = [...table.tBodies], rows = bodies.length > 1 ? bodies : [...bodies[0].rows];
    const missing = text => text === "" || text === "–";
    rows.map(row => [key(row, column), row]).sort(([a], [b]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      const order = isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b;
      return ascending ? order : -order;
    }).forEach(([, row]) => row.parentNode.append(row));
  };

  // Details of cells, and a filter.
  for (const more of all("button.more")) more.onclick = () => {
    const row = one(more.getAttribute("aria-controls"));
    row.hidden = !row.hidden;
    more.setAttribute("aria-expanded", !row.hidden);
  };
  for (const field of all("[data-filter]")) field.oninput = () => {
    const words = field.value.toLowerCase().split(/\s+/), section = field.closest("section");
    const bodies = all("tbody[data-g], .waiting li", section), waiting = section.querySelector(".waiting");
    for (const body of bodies) body.hidden = !words.every(word => body.textContent.toLowerCase().includes(word));
    field.closest(".tools").lastElementChild.textContent =
      field.value && bodies.filter(body => !body.hidden).length + " of " + bodies.length;
    if (waiting && field.value) waiting.open = true;
  };

  // Two groups of the reader's choice.
  for (const box of all(".compare")) {
    const words = JSON.parse(one(box.dataset.words).textContent), [first, second] = all("select", box);
    box.onchange = () => box.children[1].replaceChildren(...(words[first.value + " " + second.value] || ["The same group."])
      .map(part => Object.assign(document.createElement("span"), { textContent: part })));
    box.onchange();
  }

  // Points: what they are, by mouse, touch and keyboard; their rows and other points are marked.
  const tip = one("tip");
  const mark = (group, on) => {
    const study = group.closest("[data-study]").dataset.study;
    for (const other of all(`[data-study="${study}"] [data-g="${group.dataset.g}"]`)) other.classList.toggle("hot", on);
  };
  let current = null;
  const enter = group => {
    if (current === group) return;
    leave();
    current = group;
    mark(group, true);
    if (!group.dataset.tip) return;
    tip.textContent = group.dataset.tip;
    tip.hidden = false;
    settle();
  };
  const settle = () => {
    const group = current;
    const at = (group.querySelector(".mark") || group).getBoundingClientRect(), size = tip.getBoundingClientRect();
    const wide = document.documentElement.clientWidth;
    const right = at.right + 10 + size.width < wide;
    tip.style.left = Math.max(6, Math.min(right ? at.right + 10 : at.left - size.width - 10, wide - size.width - 6)) + "px";
    tip.style.top = Math.max(6, Math.min(at.top - size.height / 2, innerHeight - size.height - 6)) + "px";
  };
  const leave = () => {
    if (current) mark(current, false);
    current = null;
    tip.hidden = true;
  };
  addEventListener("pointerover", event => {
    const group = event.target.closest && event.target.closest("[data-g]");
    if (group) enter(group); else leave();
  });
  addEventListener("focusin", event => event.target.matches(".pt") ? enter(event.target) : leave());
  // A point that the keyboard has reached may scroll into view.
  addEventListener("scroll", () => current && current === document.activeElement ? settle() : leave(), { passive: true });
  addEventListener("keydown", event => {
    if (event.key === "Escape") leave();
    const point = event.target.closest && event.target.closest(".pt");
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (!point || !step) return;
    event.preventDefault();
    const place = other => { const box = other.querySelector(".mark").getBoundingClientRect(); return box.left * 1e4 - box.top; };
    const points = all(".pt", point.ownerSVGElement).sort((a, b) => place(a) - place(b));
    const next = points[(points.indexOf(point) + step + points.length) % points.length];
    point.setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus({ preventScroll: true });
  });

  // Pictures and maps, larger.
  const big = one("big");
  big.querySelector("button").onclick = () => big.close();
  big.onclick = event => event.target === big && big.close();
  for (const zoom of all(".zoom")) zoom.onclick = () => {
    one("big-title").textContent = zoom.dataset.caption;
    const picture = zoom.firstElementChild.cloneNode(true), content = big.querySelector(".content");
    content.className = "content " + zoom.dataset.kind;
    content.replaceChildren(picture);
    const source = one(zoom.dataset.tokens);
    if (source) {
      const [queries, keys] = JSON.parse(source.textContent);
      const list = (words, name) => {
        const box = document.createElement("div");
        box.className = name;
        for (const word of words) box.append(Object.assign(document.createElement("span"), { textContent: word }));
        return box;
      };
      content.style.setProperty("--columns", keys.length);
      content.style.setProperty("--rows", queries.length);
      content.prepend(list(keys, "keys"), list(queries, "queries"));
    }
    big.showModal();
  };
})();
