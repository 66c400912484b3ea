//! Equal files make equal images (`deploy/images/oci-image`): the umask of whoever builds does
//! not count, and a user that is not root can read them.

use std::path::Path;
use std::process::Command;

use anyhow::ensure;

/// Writes the image of a small directory, made with this umask.
fn image(folder: &Path, umask: &str) -> anyhow::Result<Vec<u8>> {
    let script = r#"
        set -eu
        umask "$1"
        mkdir -p "$2/root/usr/bin"
        echo text >"$2/root/file"
        echo program >"$2/root/usr/bin/program"
        chmod u+x "$2/root/usr/bin/program"
        ln -s usr/bin "$2/root/bin"
        "$3" "$2/root" --output "$2/image.tar" --ref example/image:1
    "#;
    let folder = folder.join(umask);
    std::fs::create_dir(&folder)?;
    let tool = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/images/oci-image");
    let done = Command::new("sh")
        .args(["-c", script, "sh", umask])
        .arg(&folder)
        .arg(tool)
        .output()?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "umask {umask}: {said}");
    Ok(std::fs::read(folder.join("image.tar"))?)
}

#[test]
fn a_umask_does_not_reach_the_image() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let images = [
        image(folder.path(), "022")?,
        image(folder.path(), "077")?,
        image(folder.path(), "000")?,
    ];
    ensure!(
        images[0] == images[1] && images[0] == images[2],
        "the images differ"
    );
    Ok(())
}
