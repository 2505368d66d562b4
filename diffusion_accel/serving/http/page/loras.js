// A line for each LoRA: whether it acts, and its scale. The value is a text: [{"name": "…", "on": false, "scale": 1}, …]
const list = element.querySelector("div");

function made(kind, values) {
  return Object.assign(document.createElement(kind), values);
}

function show() {
  const loras = JSON.parse(props.value || "[]");
  list.replaceChildren(...loras.map((lora) => {
    const line = made("label"), on = made("input", { type: "checkbox", checked: lora.on });
    const scale = made("input", { type: "number", value: lora.scale, step: 0.1, min: -10, max: 10 });
    scale.setAttribute("aria-label", `scale of ${lora.name}`);
    line.append(on, made("span", { textContent: lora.name }), scale);
    line.addEventListener("input", (event) => {
      if (event.target === scale) on.checked = true;
      Object.assign(lora, { on: on.checked, scale: scale.valueAsNumber });
      props.value = JSON.stringify(loras);
    });
    return line;
  }));
}

watch("value", show);
show();
