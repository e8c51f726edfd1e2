"""Text-only questions about medical imaging; held-out questions are rewordings of training questions."""

from collections.abc import Sequence

# Per fact: the answer, then its questions; the last question is reserved for the held-out split.
_FACTS = """
Computed tomography uses X-rays, a form of ionising radiation.
What kind of radiation does computed tomography use?
Which radiation is a CT scan made with?
What is measured through the body in a CT scanner?
On which type of radiation does CT rely?

MRI uses magnetic fields and radio waves and no ionising radiation.
Does MRI use ionising radiation?
What does an MRI scanner use to form an image?
Which physical fields and waves is MRI based on?
Is a patient exposed to ionising radiation during MRI?

Ultrasound forms images from the echoes of high-frequency sound waves.
How does ultrasound form an image?
What is an ultrasound image made from?
Which waves does sonography use?
What does an ultrasound probe detect to build its picture?

Water has a value of 0 Hounsfield units.
What is the Hounsfield value of water?
How many Hounsfield units does water have on CT?
Which CT number is assigned to water?
What CT number, in Hounsfield units, does water have?

Air has a value of about -1000 Hounsfield units.
What is the Hounsfield value of air?
How many Hounsfield units does air have on CT?
Which CT number is assigned to air?
What CT number, in Hounsfield units, does air have?

Fat has a value of about -100 Hounsfield units.
What is the Hounsfield value of fat?
How many Hounsfield units does fatty tissue have on CT?
Which CT number is typical of fat?
What CT number, in Hounsfield units, does fat have?

Bone appears bright on CT because it attenuates X-rays strongly.
Why does bone appear bright on CT?
How does bone look on a CT image, and why?
What makes cortical bone white on CT?
Why is the skull white on a head CT?

Cerebrospinal fluid is bright on T2-weighted MRI.
How does cerebrospinal fluid appear on T2-weighted MRI?
Is cerebrospinal fluid bright or dark on a T2-weighted image?
What is the signal of CSF on T2-weighted MRI?
On T2-weighted MRI, how do the fluid-filled ventricles look?

Cerebrospinal fluid is dark on T1-weighted MRI.
How does cerebrospinal fluid appear on T1-weighted MRI?
Is cerebrospinal fluid bright or dark on a T1-weighted image?
What is the signal of CSF on T1-weighted MRI?
On T1-weighted MRI, how do the fluid-filled ventricles look?

Fat is bright on T1-weighted MRI.
How does fat appear on T1-weighted MRI?
Is fat bright or dark on a T1-weighted image?
What is the signal of fat on T1-weighted MRI?
On T1-weighted MRI without fat suppression, how does fat look?

FLAIR suppresses the signal of cerebrospinal fluid.
Which signal does a FLAIR sequence suppress?
What is suppressed in FLAIR images of the brain?
Why is cerebrospinal fluid dark on FLAIR?
What does FLAIR do to the signal of CSF?

An acute infarct is bright on diffusion-weighted MRI because diffusion is restricted.
How does an acute infarct appear on diffusion-weighted MRI?
Why is an acute ischaemic stroke bright on diffusion-weighted imaging?
What does diffusion-weighted MRI show in acute stroke?
On DWI, how does a fresh brain infarct look, and why?

Gadolinium-based agents are the usual contrast media for MRI.
Which contrast agents are usually given for MRI?
Which element is the usual MRI contrast medium based on?
What is injected to enhance an MRI?
What contrast medium does an enhanced MRI normally use?

Iodinated agents are the usual intravenous contrast media for CT.
Which contrast agents are usually given intravenously for CT?
Which element is the usual CT contrast medium based on?
What is injected to enhance a CT scan?
What intravenous contrast medium does an enhanced CT normally use?

The strength of an MRI magnet is given in tesla.
In which unit is the strength of an MRI magnet given?
What is the unit of the field strength of an MRI scanner?
What does the T in 3T MRI stand for?
Which unit measures the magnetic field of an MRI scanner?

Haematoxylin stains cell nuclei blue to purple.
What does haematoxylin stain?
Which colour do nuclei take in an H&E stain?
Which part of the cell is coloured by haematoxylin?
In H&E histology, what is stained by haematoxylin, and in which colour?

Eosin stains cytoplasm and extracellular matrix pink.
What does eosin stain?
Which colour does cytoplasm take in an H&E stain?
Which parts of the tissue are coloured by eosin?
In H&E histology, what is stained by eosin, and in which colour?

A simple cyst is anechoic on ultrasound, with enhancement behind it.
How does a simple cyst appear on ultrasound?
What are the ultrasound signs of a simple cyst?
Is a simple cyst bright or black on ultrasound?
On ultrasound, how does a simple cyst look?

A gallstone is a bright echo with an acoustic shadow on ultrasound.
How does a gallstone appear on ultrasound?
What are the ultrasound signs of a gallstone?
What lies behind a gallstone on an ultrasound image?
On ultrasound, how does a gallstone look?

Doppler ultrasound measures the direction and velocity of blood flow.
What does Doppler ultrasound measure?
What is Doppler sonography used to assess?
Which property of blood does Doppler ultrasound show?
What can Doppler ultrasound tell about blood in a vessel?

Normal lungs are dark on a chest X-ray because air attenuates X-rays little.
Why are normal lungs dark on a chest X-ray?
How do normal lungs look on a chest X-ray, and why?
What makes aerated lung dark on a radiograph?
Why does aerated lung appear dark on a chest radiograph?

A pneumothorax is air in the pleural space.
What is a pneumothorax?
Where does air collect in a pneumothorax?
What fills the pleural space in a pneumothorax?
What does the term pneumothorax mean?

Acute intracranial haemorrhage is bright on non-contrast CT.
How does acute intracranial haemorrhage appear on non-contrast CT?
Is fresh blood in the brain bright or dark on non-contrast CT?
What is the density of an acute brain haemorrhage on CT?
On a head CT without contrast, how does fresh bleeding look?

FDG PET shows the uptake of a glucose analogue by tissue.
What does FDG PET show?
Which metabolic process does FDG PET image?
What is the tracer FDG an analogue of?
What does uptake on an FDG PET scan reflect?

Mammography is low-dose X-ray imaging of the breast.
What is mammography?
Which organ does mammography image, and with what?
Which imaging technique does mammography use?
What does a mammogram show, and how is it made?
"""
FACTS = tuple(tuple(fact.splitlines()) for fact in _FACTS.strip().split("\n\n"))


def text_records(count: int, split: str, order: Sequence[int]) -> list[dict[str, object]]:
    """Return unique text-only records: each fact once, then each with its next wording, and so on.

    Args:
        count: number of records; fewer are returned if the wordings run out.
        split: "held_out" uses the last wording of each fact, other splits the wordings before it.
        order: order of the facts.
    """
    records: list[dict[str, object]] = []
    for number in range(count):
        answer, *wordings = FACTS[order[number % len(order)]]
        usable = wordings[-1:] if split == "held_out" else wordings[:-1]
        if number // len(order) == len(usable):
            break
        question = usable[number // len(order)]
        messages = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"id": f"puretext-{split}-{number}", "conversations": messages})
    return records
