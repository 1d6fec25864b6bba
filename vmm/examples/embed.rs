//! A program with a VM in it: starts one, follows its events, pauses it, looks at it, stops it.
//!
//!     cargo run --example embed -- KERNEL [COMMAND LINE]

use std::error::Error;

use vmm::config::{ByteSize, CharTarget, VmConfig};
use vmm::machine::{EndReason, EventKind, LaunchOptions, Request, VmHandle};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let kernel = arguments
        .next()
        .ok_or("usage: embed KERNEL [COMMAND LINE]")?;
    let mut config = VmConfig {
        name: "embedded".parse()?,
        serial: CharTarget::Null,
        ..VmConfig::default()
    };
    config.memory.size = ByteSize::mib(64);
    config.boot.kernel = Some(kernel.into());
    config.boot.cmdline = arguments.next().unwrap_or_default();

    // No runtime directory: nobody but this program controls the VM.
    let vm = VmHandle::launch(config, LaunchOptions::default())?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(operate(&vm))?;
    let reason = vm.wait();
    println!("ended: {reason}");
    if reason != EndReason::Stopped {
        return Err("the VM should have been stopped".into());
    }
    Ok(())
}

/// Everything that is asked of a VM goes through its client, from whatever thread.
async fn operate(vm: &VmHandle) -> Result<(), Box<dyn Error>> {
    let client = vm.client();
    let (past, mut coming) = client.events().subscribe();
    println!(
        "so far: {:?}",
        past.iter().map(|e| &e.kind).collect::<Vec<_>>()
    );

    client.request(Request::Pause).await?;
    let event = coming.recv().await?;
    assert_eq!(event.kind, EventKind::Paused);
    println!("event {}: {:?}", event.sequence, event.kind);
    let info = client.info().await?;
    println!(
        "{} is {}, {} bytes",
        info.name,
        info.state,
        info.memory_bytes.unwrap_or(0)
    );
    for device in client.devices().await? {
        println!("device {} ({})", device.id, device.kind);
    }

    client.request(Request::Resume).await?;
    println!("{} is {}", info.name, client.info().await?.state);
    client.request(Request::Stop).await?;
    // The stream ends with the VM.
    while let Ok(event) = coming.recv().await {
        println!("event {}: {:?}", event.sequence, event.kind);
    }
    Ok(())
}
