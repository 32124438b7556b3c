(() => {
  "use strict";
  const one = id => document.getElementById(id);
  const make = (name, fields = {}, ...children) => {
    const element = Object.assign(document.createElement(name), fields);
    element.append(...children);
    return element;
  };
  const data = JSON.parse(one("data").textContent), isMap = data.kind === "map", start = data.start;
  const state = { layer: start.layer, head: start.head, term: start.term, query: start.query, held: false };
  const fail = error => {
    one("problem").hidden = false;
    one("problem").textContent = "The weights cannot be shown in this browser (" + error + ").";
  };

  // Weights: bytes, decompressed when they are first asked for.
  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const unpacked = new Map();
  const unpack = (layer, term, head) => {
    const name = [layer.name, term, head].join("\n");
    if (!unpacked.has(name)) unpacked.set(name, (async () => {
      const block = layer.blocks[term][head];
      const stream = new Response(bytes(block.levels)).body.pipeThrough(new DecompressionStream("deflate"));
      const levels = new Uint8Array(await new Response(stream).arrayBuffer());
      return { levels, rows: block.rows, width: levels.length / block.rows, outside: block.outside && bytes(block.outside) };
    })());
    return unpacked.get(name);
  };
  const layerNow = () => data.layers.find(layer => layer.name === state.layer);
  const value = (layer, level) => {
    const [kind, low, high] = layer.scale, place = low + (level - 1) / 254 * (high - low);
    return kind === "log2" ? 2 ** place : place * place;
  };
  const short = number => number >= 100 ? number.toFixed(0) : number >= 10 ? number.toFixed(1) : number.toFixed(2);
  const row = (weights, query) => {
    const place = weights.rows === 1 ? 0 : query;
    return weights.levels.subarray(place * weights.width, (place + 1) * weights.width);
  };
  // For each level a colour, of the same meaning as in the report of a study.
  const palette = layer => {
    const found = new Uint8Array(4 * 256), count = data.colours.length - 1;
    for (let level = 1; level < 256; level++) {
      const weight = value(layer, level);
      const part = isMap ? Math.log(Math.min(data.most, Math.max(1, weight))) / Math.log(data.most) : Math.sqrt(weight);
      found.set(data.colours[Math.round(part * count)], 4 * level);
    }
    return found;
  };

  const fill = (select, values, chosen) => {
    select.replaceChildren(...values.map(([name, text]) => make("option", { value: name, textContent: text, selected: name === chosen })));
  };
  const headName = head => head === "mean" ? "mean over heads" : "head " + head;
  const offer = () => {
    const layer = layerNow();
    if (!layer.heads.includes(state.head)) state.head = layer.heads[0];
    if (!layer.terms.includes(state.term)) state.term = "whole";
    fill(one("layer"), data.layers.map(layer => [layer.name, layer.name]), state.layer);
    fill(one("head"), layer.heads.map(head => [head, headName(head)]), state.head);
    if (isMap) fill(one("term"), layer.terms.map(term => [term, term]), state.term);
  };
  const hold = on => {
    state.held = on;
    one("hold").setAttribute("aria-pressed", on);
    one("hold").textContent = on ? "Let the query go" : "Hold the query";
  };

  // ---- Pictures
  const picture = () => {
    const stage = one("stage"), [height, width] = data.size;
    document.body.style.setProperty("--wide", width / height);
    const small = new Map();
    const clamp = (number, most) => Math.max(0, Math.min(most, number));
    // Positions are centred on the pixels stride * i.
    const cellOf = (layer, pixel) => pixel.map((at, axis) => {
      const step = layer.stride * layer.query_step;
      return clamp(Math.floor(at / step + 0.5), layer.query_size[axis] - 1);
    });
    const pixelOf = (layer, cell) => cell.map(place => place * layer.stride * layer.query_step);
    const place = (layer, canvas) => {
      const side = layer.stride * layer.kv_stride, first = 0.5 - side / 2, [rows, columns] = layer.key_size;
      canvas.style.left = 100 * first / width + "%";
      canvas.style.top = 100 * first / height + "%";
      canvas.style.width = 100 * columns * side / width + "%";
      canvas.style.height = 100 * rows * side / height + "%";
    };
    const paint = (layer, canvas, levels, colours) => {
      const [rows, columns] = layer.key_size;
      canvas.width = columns;
      canvas.height = rows;
      place(layer, canvas);
      const image = new ImageData(columns, rows);
      for (let key = 0; key < levels.length; key++) image.data.set(colours.subarray(4 * levels[key], 4 * levels[key] + 4), 4 * key);
      canvas.getContext("2d").putImageData(image, 0, 0);
    };
    const ring = (element, layer, cell) => {
      const [y, x] = pixelOf(layer, cell);
      element.style.left = 100 * (x + 0.5) / width + "%";
      element.style.top = 100 * (y + 0.5) / height + "%";
    };
    const source = stage.querySelector("img").src;
    const build = () => {
      small.clear();
      one("terms").replaceChildren(...layerNow().terms.map(term => {
        const canvas = make("canvas"), mark = make("span", { className: "ring" }), words = make("small");
        const frame = make("span", { className: "stage" }, make("img", { src: source, alt: "", draggable: false }), canvas, mark);
        frame.style.aspectRatio = width + "/" + height;
        frame.style.display = "block";
        const button = make("button", { type: "button", onclick: () => { state.term = term; offer(); draw(); } }, frame, words);
        button.dataset.term = term;
        small.set(term, { canvas, mark, words, button });
        return button;
      }));
    };
    let drawing = 0;
    const draw = async () => {
      const number = ++drawing, layer = layerNow(), head = state.head, cell = cellOf(layer, state.query);
      const query = cell[0] * layer.query_size[1] + cell[1], colours = palette(layer);
      const found = await Promise.all(layer.terms.map(term => unpack(layer, term, head)));
      if (number !== drawing) return;
      const [y, x] = pixelOf(layer, cell), [tall, wide] = data.original;
      layer.terms.forEach((term, place) => {
        const levels = row(found[place], query), { canvas, mark, words, button } = small.get(term);
        const greatest = levels.reduce((best, level) => Math.max(best, level), 0);
        paint(layer, canvas, levels, colours);
        ring(mark, layer, cell);
        words.replaceChildren(make("b", { textContent: term }), " up to " + short(value(layer, greatest)) + "×");
        button.setAttribute("aria-pressed", term === state.term);
        if (term !== state.term) return;
        paint(layer, stage.querySelector("canvas"), levels, colours);
        ring(stage.querySelector(".ring"), layer, cell);
        const key = levels.indexOf(greatest), side = layer.stride * layer.kv_stride;
        const at = [Math.floor(key / layer.key_size[1]) * side, key % layer.key_size[1] * side];
        const original = pair => Math.min(tall - 1, Math.round(pair[0] * tall / height)) + ", " + Math.min(wide - 1, Math.round(pair[1] * wide / width));
        const outside = found[place].outside, share = outside ? outside[query] / 2.55 : 0;
        one("readout").textContent = "Query at pixel (" + original([y, x]) + ") of the file, row " + cell[0] * layer.query_step + ", column "
          + cell[1] * layer.query_step + " of the map. " + term + ", " + headName(head) + ": the greatest weight is "
          + short(value(layer, greatest)) + "× the mean, at pixel (" + original(at) + ")."
          + (share >= 0.5 ? " " + share.toFixed(0) + " % of the weight lies on the padding around the picture." : "");
        stage.dataset.query = cell.map(one => one * layer.query_step).join(",");
        stage.dataset.peak = at.join(",");
      });
    };
    const follow = event => {
      const box = stage.getBoundingClientRect();
      state.query = [clamp((event.clientY - box.top) / box.height * height - 0.5, height - 1), clamp((event.clientX - box.left) / box.width * width - 0.5, width - 1)];
      draw().catch(fail);
    };
    stage.addEventListener("pointermove", event => { if (!state.held && (event.pointerType === "mouse" || event.buttons)) follow(event); });
    stage.addEventListener("pointerdown", event => {
      if (event.pointerType !== "mouse") { follow(event); return; }
      if (state.held) hold(false);
      else { follow(event); hold(true); }
    });
    stage.addEventListener("keydown", event => {
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (event.key === "Enter" || event.key === " ") { hold(!state.held); event.preventDefault(); }
      if (!step) return;
      event.preventDefault();
      const layer = layerNow(), cell = cellOf(layer, state.query);
      state.query = pixelOf(layer, cell.map((at, axis) => clamp(at + step[axis], layer.query_size[axis] - 1)));
      hold(true);
      draw().catch(fail);
    });
    one("term").onchange = event => { state.term = event.target.value; draw().catch(fail); };
    one("colour").onchange = event => document.body.classList.toggle("in-colour", event.target.checked);
    build();
    return { draw, build };
  };

  // ---- Sentences
  const sentence = () => {
    const queries = one("queries"), rows = one("rows");
    let tokens = [], drawing = 0;
    const choose = place => {
      state.query = Math.max(0, Math.min(tokens.length - 1, place));
      draw().catch(fail);
    };
    const build = () => {
      const layer = layerNow();
      state.query = Math.min(state.query, layer.queries.length - 1);
      one("which").textContent = layer.name.startsWith("decoder.") ? "The word that the decoder is about to predict." : "A word of the source.";
      tokens = layer.queries.map((word, place) => {
        const token = make("span", { textContent: word, id: "query-" + place });
        token.setAttribute("role", "option");
        token.addEventListener("pointerenter", () => { if (!state.held) choose(place); });
        token.addEventListener("click", () => { const same = state.held && state.query === place; choose(place); hold(!same); });
        return token;
      });
      queries.replaceChildren(...tokens);
      rows.replaceChildren(...layer.terms.map(term => {
        const words = make("div", { className: "tokens" }, ...layer.keys.map(word => make("span", {}, word, make("small"))));
        const line = make("div", { className: "row" }, make("b", { textContent: term }), words);
        line.dataset.term = term;
        return line;
      }));
    };
    const draw = async () => {
      const number = ++drawing, layer = layerNow(), head = state.head, colours = palette(layer);
      const found = await Promise.all(layer.terms.map(term => unpack(layer, term, head)));
      if (number !== drawing) return;
      tokens.forEach((token, place) => token.setAttribute("aria-selected", place === state.query));
      queries.setAttribute("aria-activedescendant", "query-" + state.query);
      layer.terms.forEach((term, place) => {
        const levels = row(found[place], state.query);
        [...rows.children[place].lastElementChild.children].forEach((token, key) => {
          const level = levels[key], [red, green, blue] = colours.subarray(4 * level);
          token.className = level ? "" : "unseen-key";
          token.style.background = level ? "rgb(" + red + " " + green + " " + blue + ")" : "";
          token.style.color = level ? (0.3 * red + 0.59 * green + 0.11 * blue > 128 ? "#000" : "#fff") : "";
          token.lastElementChild.textContent = level ? value(layer, level).toFixed(2) : "–";
        });
        if (term !== "whole") return;
        const greatest = levels.reduce((best, level) => Math.max(best, level), 0), key = levels.indexOf(greatest);
        one("readout").textContent = "Query " + (state.query + 1) + ", " + layer.queries[state.query] + ", " + headName(head)
          + ": the greatest weight of all terms is " + value(layer, greatest).toFixed(2) + ", on " + layer.keys[key] + " (" + (key + 1) + ").";
        queries.dataset.query = state.query;
        queries.dataset.peak = key;
      });
    };
    queries.addEventListener("keydown", event => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Enter" || event.key === " ") { hold(!state.held); event.preventDefault(); }
      if (!step) return;
      event.preventDefault();
      hold(true);
      choose(state.query + step);
    });
    build();
    return { draw, build };
  };

  offer();
  const view = isMap ? picture() : sentence();
  one("layer").onchange = event => { state.layer = event.target.value; offer(); view.build(); view.draw().catch(fail); };
  one("head").onchange = event => { state.head = event.target.value; view.draw().catch(fail); };
  one("hold").onclick = () => hold(!state.held);
  one("choices").onsubmit = event => event.preventDefault();
  view.draw().catch(fail);
})();
