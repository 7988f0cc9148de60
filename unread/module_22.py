def function_22(x):
    return x + 22
def function_22(x):
    return x + 22
def function_22(x):
    return x + 22
def function_22(x):
    return x + 22
def function_22(x):
    return x + 22
