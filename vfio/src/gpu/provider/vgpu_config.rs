//! The file by which NVIDIA's vGPU host driver knows its types: elements
//! `<vgpuType id="586" name="NVIDIA A10-6Q" ...>`. Of a type that can no longer be made it alone has the name.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::nvidia::Types;

/// Where the driver's installer puts it.
pub(in crate::gpu) const VGPU_CONFIG: &str = "/usr/share/nvidia/vgpu/vgpuConfig.xml";

/// Bytes that are read: many times what there is.
const FILE_MAX: u64 = 16 << 20;

/// Longer names are none of a type's.
const NAME_MAX: usize = 64;

/// The names of those types among these that the file knows.
pub(super) fn names_of(file: &Path, ids: &BTreeSet<u32>) -> Types {
    read(file).map_or_else(|_| Types::new(), |text| named(&text, ids))
}

fn read(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(file)?.take(FILE_MAX).read_to_string(&mut text)?;
    Ok(text)
}

fn named(text: &str, ids: &BTreeSet<u32>) -> Types {
    let mut names = Types::new();
    for element in text.split("<vgpuType ").skip(1) {
        let attributes = element.split_once('>').map(|(attributes, _)| attributes);
        let attribute = |name| attribute(attributes?, name);
        let id = attribute("id").and_then(|id| id.parse().ok());
        let name = attribute("name").filter(|name| is_name(name));
        if let (Some(id), Some(name)) = (id, name)
            && ids.contains(&id)
        {
            names.entry(id).or_insert_with(|| name.to_owned());
        }
    }
    names
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= NAME_MAX && !text.contains(char::is_control)
}

fn attribute<'t>(attributes: &'t str, name: &str) -> Option<&'t str> {
    let mut rest = attributes;
    loop {
        let (key, after) = rest.split_once("=\"")?;
        let (value, next) = after.split_once('"')?;
        if key.trim() == name {
            return Some(value);
        }
        rest = next;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn types_names_are_found_by_their_numbers() {
        let name = format!("drover-vgpu-config-{}.xml", std::process::id());
        let file = std::env::temp_dir().join(name);
        let long = "x".repeat(NAME_MAX + 1);
        let text = format!(
            r#"<vgpuconfig><pgpu><supportedVgpu vgpuId="586"></supportedVgpu></pgpu>
            <vgpuType id="58" name="NVIDIA A10-1B" class="NVS"><framebuffer>0x0</framebuffer></vgpuType>
            <vgpuType name="NVIDIA A10-6Q" class="Quadro" id="586"/>
            <vgpuType id="1" class="no name"><x name="another's"/></vgpuType>
            <vgpuType id="2" name="{long}"></vgpuType><vgpuType id="3" name="cut off"#
        );
        fs::write(&file, text).expect("the folder is ours");
        let ids = BTreeSet::from([586, 58, 5, 1, 2, 3]);
        let expected = [(58, "NVIDIA A10-1B"), (586, "NVIDIA A10-6Q")];
        let expected = Types::from(expected.map(|(id, name)| (id, name.to_owned())));
        assert_eq!(names_of(&file, &ids), expected);
        let one = BTreeSet::from([58]);
        assert_eq!(names_of(&file, &one).len(), 1);
        fs::remove_file(&file).expect("it is ours");
        assert_eq!(names_of(&file, &ids), Types::new());
    }
}
