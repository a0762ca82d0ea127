// A file that was uploaded, dropped, pasted or photographed.

import { h } from "./common.js";

const TYPES = { jpg: "jpeg", tif: "tiff", heif: "heic", "x-ms-bmp": "bmp" }; // by ending or type, where they differ
const UNSHOWN = ["image/heic", "image/tiff"]; // by most browsers; the server reads them

/** Its type as the server takes it; a browser that does not know one gives none. */
function typeOf({ name, type }) {
  if (type && !type.startsWith("image/")) return type;
  const kind = (type.slice("image/".length) || name.split(".").at(-1)).toLowerCase();
  return `image/${TYPES[kind] ?? kind}`;
}

/** An <img> of it, the right way up; null if this browser cannot show it. */
async function imageOf(file) {
  const address = URL.createObjectURL(file);
  const image = h("img", { src: address, alt: "The picture that is read" });
  try {
    await image.decode();
    return image;
  } catch {
    return null;
  } finally {
    URL.revokeObjectURL(address);
  }
}

/** What is to be read, as a source of the page; null if it is no image. */
export async function open(file) {
  const [type, image] = [typeOf(file), await imageOf(file)];
  return image || UNSHOWN.includes(type) ? toRead(file, type, image, file.name) : null;
}

export function toRead(file, type, image, name) {
  return { kind: "picture", file, type, image, name, answer: null, refused: false, chosen: 0 };
}
