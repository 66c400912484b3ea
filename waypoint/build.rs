//! Where the code of the released program stands: see `hot-code.ld`.

use std::env;
use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=hot-code.ld");
    let released = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let elf = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux");
    if released && elf {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("hot-code.ld");
        println!("cargo:rustc-link-arg-bins=-Wl,-T,{}", script.display());
    }
}
