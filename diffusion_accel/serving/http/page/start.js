// The image that a drawing starts from: dropped here, or chosen, it goes to the server as a data address.
const largest = 16 * 2 ** 20; // bytes; memory.py says the same
const [input, image, words, remove] = ["input", "img", "span", "button"].map((name) => element.querySelector(name));
const usual = words.textContent;

function show(told) {
  image.hidden = remove.hidden = !props.value;
  if (props.value) image.src = props.value;
  words.textContent = told ?? (props.value ? "" : usual);
}

function take(file) {
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => {
    props.value = reader.result;
    show();
  };
  if (file.size <= largest) return reader.readAsDataURL(file);
  props.value = "";
  show(`The image has more than ${largest / 2 ** 20} MiB.`);
}

input.addEventListener("change", () => {
  take(input.files[0]);
  input.value = "";
});
remove.addEventListener("click", () => {
  props.value = "";
  show();
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  element.addEventListener(kind, (event) => {
    event.preventDefault();
    element.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
}
watch("value", () => show());
show();
