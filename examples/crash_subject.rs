//! What `cargo xtask crash` kills: one tenant, one volume, one tiny guest; made, used, and removed again.
//!
//! `iaas-crash-subject --state FOLDER` does the whole story and prints `SETTLED`. Killed anywhere and started again, it
//! finishes the *same* create, by the same tokens, uses what it made, and leaves nothing. A file says that it came as far as
//! removing; until then no error of the create is forgiven.

use std::process::ExitCode;
use std::time::Duration;

use iaas_core::ByteSize;
use iaas_core::Result;
use iaas_core::cloud::NewInstance;
use iaas_core::cloud::Session;
use iaas_core::model::*;
use iaas_core::security::actions::Nic;
use iaas_examples::guest::Guest;
use iaas_examples::machine;
use iaas_examples::machine::Arguments;

fn main() -> ExitCode {
    machine::init();
    match story(&Arguments::parse()) {
        Ok(()) => {
            println!("SETTLED");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("iaas-crash-subject failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn story(arguments: &Arguments) -> Result<()> {
    machine::fix_ids(&arguments.state)?;
    let machine = machine::open(&arguments.state).await?;
    let me = machine.cloud.session_as("operator");
    let removing = arguments.state.join("removing");
    if !removing.exists() {
        make(&me, arguments).await?;
        std::fs::write(&removing, "").map_err(machine::io)?;
    }
    machine::remove_all(&me).await?;
    machine::ensure(machine.cloud.orphans_removed() == 0, || "a sweep removed something".to_owned())?;
    machine.close().await
}

/// Makes and uses everything.
async fn make(me: &Session, arguments: &Arguments) -> Result<()> {
    let organization =
        me.organizations().create(Owner::Cloud, "acme", Empty {}).token("organization").await?.out;
    let project =
        me.projects().create(organization, "shop", ProjectSpec { organization }).token("project").await?.out;
    let network = me.networks().create(project, "vpc", NetworkSpec::default()).token("network").await?.out;
    let spec = SubnetSpec::new(network, vec!["10.1.1.0/24".parse()?, "fd00:1:1::/64".parse()?])?;
    let subnet = me.subnets().create(project, "front", spec).token("subnet").await?.out;
    let size = VolumeSpec::new(ByteSize::mib(8))?;
    let volume = me.volumes().create(project, "data", size).token("volume").await?.wait().await?;
    let cmdline = "console=ttyS0 panic=-1 quiet guest.run=tiny";
    let (kernel, initrd) = (&arguments.kernel, arguments.initrd.as_path());
    let image = match me.images().named(project, "tiny").await {
        Ok(image) => image.meta.id,
        Err(_) => me.images().import(project, "tiny", kernel, Some(initrd), cmdline).await?.out,
    };
    let size = InstanceTypeSpec::new(1, ByteSize::mib(96))?;
    let size = me.instance_types().create(Owner::Cloud, "tiny", size).token("instance-type").await?.out;
    let new = NewInstance {
        name: "guest".to_owned(),
        instance_type: size,
        image,
        cmdline: String::new(),
        nics: vec![Nic::New(PortSpec { subnet, groups: [].into(), addresses: Vec::new() })],
        volumes: vec![volume],
    };
    let guest = me.instances().launch(project, new).token("instance").await?.wait().await?;
    let used = Guest::follow(me, guest).line("TINY-USED", Duration::from_secs(60)).await?;
    machine::ensure(used.contains("disk=ok ip4=10.1.1."), || format!("the guest says: {used}"))
}
