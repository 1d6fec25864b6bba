//! Which partition a VM is given, or why none.

use std::fmt;

use super::error::ClaimError;
use super::request::{GpuRequest, Misfit};
use super::view::{View, Whole};
use crate::gpu::address::{Address, GpuAddress};
use crate::gpu::offer::{Kind, Offer};

/// Names of one list in a message.
const NAMES_MAX: usize = 16;

/// The partition of the GPU that has the fewest in use, of those the most left, of those the first.
pub(super) fn choose(
    views: &[View],
    request: &GpuRequest,
) -> Result<(GpuAddress, Offer), ClaimError> {
    let named = named(views, request);
    if let (Some(address), true) = (request.pci, named.is_empty()) {
        return Err(ClaimError::Missing(format!(
            "{address} is no GPU of this host, and no partition of one"
        )));
    }
    let fitting = named
        .iter()
        .filter_map(|view| Some((view, best(view, request).ok()?)));
    let least =
        fitting.min_by_key(|(view, _)| (view.taken.len(), usize::MAX - view.free.len(), view.gpu));
    match least {
        Some((view, offer)) => Ok((view.gpu, offer.clone())),
        None => Err(refusal(&named, request)),
    }
}

/// Why a VM cannot have all that it asks for, this among it, when it could have `had` pieces of it and has
/// none of them now.
pub(super) fn shortage(views: &[View], request: &GpuRequest, had: usize) -> ClaimError {
    // This alone cannot be had.
    if let Err(refusal) = choose(views, request) {
        return refusal;
    }
    let mut error = refusal(&named(views, request), request);
    if let ClaimError::Exhausted { details, .. } | ClaimError::Unsuitable { details, .. } =
        &mut error
    {
        *details = format!("only {had} of what is asked for can be had at once; {details}");
    }
    error
}

fn named<'v>(views: &'v [View], request: &GpuRequest) -> Vec<&'v View> {
    let views = views.iter();
    views.filter(|view| is_meant(view, request)).collect()
}

fn is_meant(view: &View, request: &GpuRequest) -> bool {
    request.pci.is_none_or(|address| {
        let is = |offer: &Offer| offer.address == Address::Pci(address);
        view.gpu == address
            || view.free.iter().any(is)
            || view.taken.iter().any(|taken| is(&taken.offer))
    })
}

/// The smallest partition of a GPU that fits, before those that would have to be made; or why none
/// does.
fn best<'v>(view: &'v View, request: &GpuRequest) -> Result<&'v Offer, String> {
    let is_named = request.pci == Some(view.gpu);
    let has_parts = !(view.free.is_empty() && view.taken.is_empty());
    if request.wants_whole() || (is_named && !has_parts && request.kind.is_none()) {
        return whole(view, request);
    }
    let is_asked = |offer: &&Offer| match request.pci {
        Some(address) if !is_named => offer.address == Address::Pci(address),
        _ => true,
    };
    let mut misfit = None;
    let mut fitting = Vec::new();
    for offer in view.free.iter().filter(is_asked) {
        match request.judge(offer) {
            Ok(()) => fitting.push(offer),
            Err(why) => misfit = misfit.max(Some(why)),
        }
    }
    fitting.sort_by_key(|offer| {
        (
            offer.setup.is_making(),
            offer.vram_bytes.unwrap_or(u64::MAX),
        )
    });
    let Some(first) = fitting.first() else {
        return Err(why_none(view, request, misfit));
    };
    // Which type is meant nobody has said, and there are several.
    let is_said = request.kind.is_some() || request.min_vram_bytes.is_some();
    let kinds = kinds(fitting.iter().copied());
    match first.setup.is_making() && !is_said && kinds.len() > 1 {
        true => Err(format!("a type must be named, there are {}", names(&kinds))),
        false => Ok(first),
    }
}

fn whole<'v>(view: &'v View, request: &GpuRequest) -> Result<&'v Offer, String> {
    let offer = match &view.whole {
        Whole::Free(offer) => offer,
        Whole::Taken(owner) => return Err(format!("{owner} has all of it")),
        Whole::Not(why) => return Err(why.clone()),
    };
    let of_any_type = GpuRequest {
        kind: None,
        ..request.clone()
    };
    match of_any_type.judge(offer) {
        Ok(()) => Ok(offer),
        Err(why) => Err(why_none(view, request, Some(why))),
    }
}

fn why_none(view: &View, request: &GpuRequest, misfit: Option<Misfit>) -> String {
    let nothing = match &view.whole {
        Whole::Taken(owner) => format!("{owner} has all of it"),
        Whole::Free(_) => "it is not divided, and given whole when it is named".to_owned(),
        Whole::Not(_) if view.taken.is_empty() => "it has no partitions".to_owned(),
        Whole::Not(_) => "none is free".to_owned(),
    };
    let kinds = kinds(&view.free);
    let mut taken = view.taken.iter().map(|taken| &taken.offer);
    let is_taken = taken.any(|offer| request.judge(offer).is_ok());
    match misfit {
        None => nothing,
        Some(_) if is_taken => "all such are taken".to_owned(),
        Some(Misfit::Type) if kinds.is_empty() => "its partitions have no types".to_owned(),
        Some(Misfit::Type) => format!("it has no such type, there are {}", names(&kinds)),
        Some(Misfit::Memory(None)) => "how much memory they have is not known".to_owned(),
        Some(Misfit::Memory(Some(bytes))) => format!("they have {} MiB at most", bytes >> 20),
        Some(Misfit::Obstacle(why)) => why,
    }
}

fn kinds<'o>(offers: impl IntoIterator<Item = &'o Offer>) -> Vec<&'o Kind> {
    let mut kinds: Vec<&Kind> = Vec::new();
    for kind in offers.into_iter().filter_map(|offer| offer.kind.as_ref()) {
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds
}

fn names(kinds: &[&Kind]) -> String {
    let named = kinds
        .iter()
        .map(|kind| format!("{} ({})", kind.name, kind.id));
    listed(named, kinds.len())
}

/// The first of many.
fn listed(texts: impl Iterator<Item = String>, count: usize) -> String {
    let shown: Vec<_> = texts.take(NAMES_MAX).collect();
    match count.saturating_sub(NAMES_MAX) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// Whether others have what there would have been, and what of it there is.
fn refusal(views: &[&View], request: &GpuRequest) -> ClaimError {
    let would_fit = |view: &&View| {
        let is_asked = |offer: &Offer| {
            request
                .pci
                .is_none_or(|pci| pci == view.gpu || offer.address == Address::Pci(pci))
        };
        // Of one whose type is not offered any more nobody knows what it was.
        let fits = |offer: &Offer| {
            let misfit = request.judge(offer).err();
            misfit.is_none_or(|why| why == Misfit::Memory(None))
        };
        let mut taken = view.taken.iter().map(|taken| &taken.offer);
        let is_whole = matches!(view.whole, Whole::Taken(_));
        match request.wants_whole() {
            true => is_whole || !view.taken.is_empty(),
            false => is_whole || taken.any(|offer| is_asked(offer) && fits(offer)),
        }
    };
    let is_taken = views.iter().any(would_fit);
    let details = match views.is_empty() {
        true => "this host has no GPU".to_owned(),
        false => views
            .iter()
            .map(|view| verdict(view, request))
            .collect::<Vec<_>>()
            .join("; "),
    };
    let wanted = request.to_string();
    match is_taken {
        true => ClaimError::Exhausted { wanted, details },
        false => ClaimError::Unsuitable { wanted, details },
    }
}

/// `0000:41:00.0: none is free (0000:41:00.4 by web (pid 12))`.
fn verdict(view: &View, request: &GpuRequest) -> String {
    let why = best(view, request).err();
    let why = why.unwrap_or_else(|| "it has no more".to_owned());
    let gpu = view.gpu;
    if view.taken.is_empty() {
        return format!("{gpu}: {why}");
    }
    let count = view.taken.len();
    let taken = listed(view.taken.iter().map(ToString::to_string), count);
    let is_all = !view.free.iter().any(|offer| !offer.setup.is_making());
    match (is_all, count) {
        (_, 1) => format!("{gpu}: {why}; 1 partition is taken ({taken})"),
        (true, _) => format!("{gpu}: {why}; all {count} partitions are taken ({taken})"),
        (false, _) => format!("{gpu}: {why}; {count} partitions are taken ({taken})"),
    }
}

impl fmt::Display for GpuRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match (self.wants_whole(), self.count) {
            (true, 1) => "a whole GPU".to_owned(),
            (true, count) => format!("{count} whole GPUs"),
            (false, 1) => "a GPU partition".to_owned(),
            (false, count) => format!("{count} GPU partitions"),
        };
        f.write_str(&what)?;
        if let Some(kind) = self.kind.as_ref().filter(|_| !self.wants_whole()) {
            write!(f, " of type {kind}")?;
        }
        if let Some(bytes) = self.min_vram_bytes {
            write!(f, " with {} MiB or more", bytes.div_ceil(1 << 20))?;
        }
        match self.pci {
            Some(address) => write!(f, " at {address}"),
            None => Ok(()),
        }
    }
}
