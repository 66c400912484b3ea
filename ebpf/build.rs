//! Compiles the BPF programs of `bpf/` with clang, from our sources and the kernel's uapi headers alone.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// One object per program family; each is embedded into the crate.
const OBJECTS: [&str; 3] = ["sock", "lookup", "probe"];
const HEADERS: [&str; 2] = ["helpers.bpf.h", "mesh.bpf.h"];

fn main() {
    println!("cargo::rerun-if-env-changed=CLANG");
    for header in HEADERS {
        println!("cargo::rerun-if-changed=bpf/{header}");
    }
    let out = PathBuf::from(variable("OUT_DIR"));
    let clang = std::env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let includes = uapi_headers();
    for object in OBJECTS {
        let source = format!("bpf/{object}.bpf.c");
        println!("cargo::rerun-if-changed={source}");
        compile(
            &clang,
            &includes,
            Path::new(&source),
            &out.join(format!("{object}.o")),
        );
    }
}

/// Where the kernel's headers are: `asm/` is in a folder named after the machine on Debian.
fn uapi_headers() -> Vec<PathBuf> {
    let machine = variable("CARGO_CFG_TARGET_ARCH");
    let root = Path::new("/usr/include");
    let multiarch = root.join(format!("{machine}-linux-gnu"));
    if multiarch.join("asm/types.h").exists() {
        return vec![multiarch, root.to_owned()];
    }
    if root.join("asm/types.h").exists() && root.join("linux/bpf.h").exists() {
        return vec![root.to_owned()];
    }
    fail(&format!(
        "the kernel's uapi headers (asm/types.h, linux/bpf.h) for {machine} are not installed; on Debian: apt-get install linux-libc-dev"
    ))
}

fn compile(clang: &str, includes: &[PathBuf], source: &Path, object: &Path) {
    let mut command = Command::new(clang);
    command.args(["-target", "bpf", "-mcpu=v2", "-O2", "-g", "-std=gnu11"]);
    command.args([
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-variable",
        "-Wno-unused-function",
        "-Wno-sign-compare",
    ]);
    // What the object records must not depend on where it was built.
    command
        .arg("-ffile-prefix-map=bpf=bpf")
        .arg("-fdebug-compilation-dir=.");
    for include in includes {
        command.arg("-idirafter").arg(include);
    }
    command.arg("-c").arg(source).arg("-o").arg(object);
    match command.output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => fail(&format!(
            "{clang} could not compile {}:\n{}",
            source.display(),
            String::from_utf8_lossy(&output.stderr)
        )),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => fail(&format!(
            "{clang} was not found: the BPF programs of adit-ebpf are compiled by clang 11 or newer; on Debian: apt-get install clang (or set CLANG)"
        )),
        Err(error) => fail(&format!("{clang} could not be started: {error}")),
    }
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| fail(&format!("cargo did not set {name}")))
}

fn fail(message: &str) -> ! {
    for line in message.lines() {
        println!("cargo::error={line}");
    }
    exit(1)
}
