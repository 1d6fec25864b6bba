//! The file by which NVIDIA's vGPU host driver knows its types: elements
//! `<vgpuType id="586" name="NVIDIA A10-6Q" ...>`. Of a type that can no longer be made it alone has the name.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Where the driver's installer puts it.
pub(in crate::gpu) const VGPU_CONFIG: &str = "/usr/share/nvidia/vgpu/vgpuConfig.xml";

/// Bytes that are read: many times what there is.
const FILE_MAX: u64 = 16 << 20;

/// Longer names are none of a type's.
const NAME_MAX: usize = 64;

/// The name of the type with this number.
pub(super) fn name_of(file: &Path, id: u32) -> Option<String> {
    let mut text = String::new();
    let file = File::open(file).ok()?;
    file.take(FILE_MAX).read_to_string(&mut text).ok()?;
    let id = id.to_string();
    let mut elements = text.split("<vgpuType ").skip(1);
    let attributes = elements.find_map(|element| {
        let (attributes, _) = element.split_once('>')?;
        (attribute(attributes, "id")? == id).then_some(attributes)
    });
    let name = attribute(attributes?, "name")?;
    let is_name = !name.is_empty() && name.len() <= NAME_MAX && !name.contains(char::is_control);
    is_name.then(|| name.to_owned())
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
    fn a_types_name_is_found_by_its_number() {
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
        for (id, expected) in [
            (586, Some("NVIDIA A10-6Q")),
            (58, Some("NVIDIA A10-1B")),
            (5, None),
            (1, None),
            (2, None),
            (3, None),
        ] {
            assert_eq!(name_of(&file, id).as_deref(), expected, "{id}");
        }
        fs::remove_file(&file).expect("it is ours");
        assert_eq!(name_of(&file, 586), None);
    }
}
