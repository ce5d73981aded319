({
  // what a screen reader would stumble over
  nameless() {
    const faults = [];
    const text = (id) => document.getElementById(id)?.textContent ?? "";
    const name = (one) => {
      const labels = [...(one.labels ?? [])].map((label) => label.textContent);
      const named = (one.getAttribute("aria-labelledby") ?? "").split(" ").map(text).join("");
      return (one.ariaLabel || named || labels.join("") || (one.matches("input, select, textarea") ? "" : one.textContent)).trim();
    };
    const named = "input, select, textarea, button, a[href], summary, [role=option], [role=listbox], dialog, [role=img], progress";
    for (const one of document.querySelectorAll(named)) {
      if (!name(one)) faults.push(`without a name: ${one.outerHTML.slice(0, 120)}`);
    }
    for (const attribute of ["aria-describedby", "aria-labelledby", "for"]) {
      for (const one of document.querySelectorAll(`[${attribute}]`)) {
        for (const id of one.getAttribute(attribute).split(" ").filter(Boolean)) {
          if (!document.getElementById(id)) faults.push(`${attribute} leads nowhere: ${id}`);
        }
      }
    }
    const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
    faults.push(...ids.filter((id, at) => ids.indexOf(id) !== at).map((id) => `twice: ${id}`));
    if (document.querySelectorAll("h1").length !== 1) faults.push("not one h1");
    for (const one of document.querySelectorAll("img:not([alt]), th:not([scope])")) faults.push(one.outerHTML);
    if (document.documentElement.lang !== "en" || !document.title) faults.push("no language or no title");
    return faults;
  },

  // texts whose contrast is below 4.5 (WCAG 2: relative luminances; backgrounds lie over each other, as they let through)
  pale() {
    const parse = (colour) => {
      const numbers = colour.match(/[\d.e-]+/g).map(Number);
      const unit = colour.startsWith("color(") ? 1 : 255;
      return [...numbers.slice(0, 3).map((one) => one / unit), numbers[3] ?? 1];
    };
    const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const behind = (one) => {
      const layers = [];
      for (let at = one; at; at = at.parentElement) layers.unshift(parse(getComputedStyle(at).backgroundColor));
      return layers.reduce((below, layer) => over(layer, below), dark ? [0, 0, 0, 1] : [1, 1, 1, 1]);
    };
    const linear = (one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const faults = [];
    let looked = 0;
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const one = walker.currentNode.parentElement;
      const said = walker.currentNode.data.trim();
      if (!said || !one.checkVisibility() || one.closest("option, noscript, title, .unseen, .skip, :disabled")) continue;
      const below = behind(one);
      const ink = over(parse(one instanceof SVGElement ? getComputedStyle(one).fill : getComputedStyle(one).color), below);
      const [more, less] = [light(ink), light(below)].sort((a, b) => b - a);
      const ratio = (more + 0.05) / (less + 0.05);
      looked += 1;
      if (ratio < 4.5) faults.push(`${ratio.toFixed(2)}: ${one.className} "${said.slice(0, 40)}"`);
    }
    return looked > 5 ? faults : ["nothing to read"];
  },
})
